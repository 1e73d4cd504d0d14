"""The column of each row's largest logit, which comes with the logits (`Output.best`): what numpy
says, whatever made the row; and never read where anything changed a row afterwards."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foretell import LLM, SamplingParams, kernels
from foretell.control.processed import ProcessedRows
from foretell.control.processors import Processors
from foretell.core.batch import Output, PackedBatch
from foretell.core.feedback import Rows, Verdict
from foretell.core.rng import SeqRng
from foretell.core.tree import TokenTree
from foretell.kernels import build
from foretell.models.native.arch import Arch
from foretell.models.native.fused import FusedModel
from foretell.verify.greedy import Greedy
from foretell.verify.judge import Judge
from foretell.verify.reflective import Reflective
from foretell.verify.walk import Settled
from helpers_bitexact import KINDS, NAMES, chain, random_arch
from helpers_grammar import ToyGrammar
from helpers_model import TableModel, pair

INT8 = KINDS[2]
needs_kernels = pytest.mark.skipif(kernels.load() is None, reason=str(kernels.why_not()))


def biased(model: FusedModel, bias: Tensor) -> Tensor:
    """Give the head a bias [V], which no family has; it may be changed afterwards."""
    model.packed["head.bias"] = bias
    model._matrix(model._handle, -1, 0, "head")
    return bias


def forwarded(model: FusedModel, *segments: Any) -> Output:
    caches = [model.new_cache() for _ in segments]
    with model.open(caches) as txn:
        return model.forward(PackedBatch(list(segments)), txn)


def check(model: FusedModel, rows: int, r: random.Random) -> Output:
    out = forwarded(model, chain([r.randrange(model.spec.vocab) for _ in range(rows)], 0))
    assert out.best is not None
    assert out.best.dtype == np.int64
    assert out.best.tolist() == out.logits.numpy().argmax(-1).tolist()
    return out


@needs_kernels
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: str(k).removeprefix("torch."))
@pytest.mark.parametrize("isa", build.supported())
def test_it_is_numpys_argmax(isa: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random architectures (caps, scales, tied heads) and biases of the head; vocabularies smaller
    than a panel, whole panels, and panels with a rest."""
    monkeypatch.setenv("FORETELL_KERNELS", isa)
    if kernels.load() is None:
        pytest.skip(str(kernels.why_not()))
    r, seen = random.Random(3), set()
    for i, vocab in enumerate((3, 31, 32, 33, 64, 95, 700, 2001)):
        model = FusedModel.random(replace(random_arch(r), vocab=vocab), kind, i, NAMES)
        if i % 2:
            biased(model, torch.randn(vocab))
        for threads in (1, 2):
            model.set_threads(threads)
            for rows in (1, 2, 5, 17, 40):
                out = check(model, rows, r)
                assert out.best is not None
                seen |= set((out.best // 32).tolist())
    assert len(seen) > 20, "winners come from many panels"


@needs_kernels
def test_padding_never_wins_even_where_all_logits_are_negative() -> None:
    for vocab in (1, 5, 33, 61):
        model = FusedModel.random(Arch.llama(vocab, 32, 1, 2, 2, 48))
        biased(model, torch.linspace(-9e8, -1e9, vocab))
        out = check(model, 3, random.Random(0))
        assert bool((out.logits < 0).all())
        assert out.best is not None
        assert out.best.tolist() == [0, 0, 0]


WIDE = Arch.llama(2000, 32, 1, 2, 2, 48)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_the_lowest_column_wins_among_equals(threads: int) -> None:
    """Equal logits in panels that other threads make, in whatever order: of two threads the first
    makes the columns below 736 and some from 1472 on."""
    model = FusedModel.random(WIDE)
    bias = biased(model, torch.zeros(2000))
    model.set_threads(threads)
    r = random.Random(0)
    for columns in ([800, 1480, 1990], [1480, 1999], [100, 800, 1480], [31, 32], [1471, 1472], [0]):
        bias[:] = 0.0
        bias[columns] = 1e9  # beside which the products are rounded away
        out = check(model, 6, r)
        assert out.best is not None
        assert out.best.tolist() == [columns[0]] * 6
    bias[:] = torch.where(torch.arange(2000) < 900, 0.0, 1e9)
    assert check(model, 6, r).best.tolist() == [900] * 6  # type: ignore[union-attr]


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_nan_wins_as_with_numpy(threads: int) -> None:
    model = FusedModel.random(WIDE)
    bias = biased(model, torch.zeros(2000))
    model.set_threads(threads)
    r = random.Random(0)
    for columns in ([800, 1480], [1480, 1999], [100, 800], [31], [0, 1]):
        bias[:] = 0.0
        bias[7], bias[1990] = math.inf, 1e9
        bias[columns] = math.nan
        assert check(model, 6, r).best.tolist() == [columns[0]] * 6  # type: ignore[union-attr]
    bias[:] = -math.inf
    assert check(model, 6, r).best.tolist() == [0] * 6  # type: ignore[union-attr]
    bias[[900, 1480]] = -1e30
    assert check(model, 6, r).best.tolist() == [900] * 6  # type: ignore[union-attr]


@needs_kernels
def test_what_a_cap_makes_equal_is_equal() -> None:
    """It is the largest of the logits that come back, not of those before cap and scale."""
    model = FusedModel.random(replace(WIDE, logit_cap=20.0, logit_scale=0.5))
    bias = biased(model, torch.zeros(2000))
    bias[[40, 45, 900]] = torch.tensor([1e4, 2e4, 3e4])
    out = check(model, 3, random.Random(0))
    assert out.logits.max() == 20
    assert out.best is not None
    assert out.best.tolist() == [40] * 3


@needs_kernels
def test_it_belongs_to_the_rows_that_were_asked_for() -> None:
    model = FusedModel.random(Arch.llama(61, 32, 2, 4, 2, 48), INT8, 5)
    parts = [chain([1, 2, 3, 4], 0), chain([9, 8, 7], 0)]
    whole = forwarded(model, *parts)
    parts[0].logits, parts[1].logits = np.array([3, 1]), np.array([2])
    some = forwarded(model, *parts)
    assert whole.best is not None
    assert some.best is not None
    assert some.best.tolist() == whole.best[[3, 1, 6]].tolist()
    assert len(set(whole.best.tolist())) > 2
    parts[0].logits = parts[1].logits = np.empty(0, np.int64)
    none = forwarded(model, *parts)
    assert none.best is not None
    assert none.best.shape == (0,)


# --- whoever reads it


def test_rows_look_it_up_by_node() -> None:
    packed = torch.zeros(5, 9)  # an argmax of this would be 0
    rows = Rows(packed, np.array([-1, 3, 0, 2, 4]), np.array([5, 6, 7, 8, 1]))
    assert [rows.argmax([n]) for n in (1, 2, 3, 4)] == [[8], [5], [7], [1]]
    assert rows.argmax([4, 1, 1]) == [1, 8, 8]
    assert rows.argmax([]) == []
    assert rows.known == {1: 8, 2: 5, 3: 7, 4: 1}
    for missing in ([0], [1, 0]):
        with pytest.raises(KeyError):
            rows.argmax(missing)
    assert Rows(packed, rows.row).known is None


def test_the_walk_reads_it_and_refuses_a_node_without_a_row() -> None:
    packed = torch.zeros(4, 9)
    tree = TokenTree.build([7], [3, 4, 6], [-1, 0, -1])
    best, plain = np.array([3, 4, 8, 2]), Processors(SamplingParams(), [7], 1)
    p = ProcessedRows(Rows(packed, np.arange(4), best), tree, plain, None)
    assert Greedy()(tree, p, SeqRng(0), 1) == Verdict([1, 2], [3, 4, 8], 2)
    assert Settled(p).probs([1, 3]).argmax(-1).tolist() == [4, 2]
    p = ProcessedRows(Rows(packed, np.array([0, -1, 2, 3]), best), tree, plain, None)
    with pytest.raises(KeyError):
        Greedy()(tree, p, SeqRng(0), 1)


def telling(target: TableModel, best: Callable[[np.ndarray], np.ndarray | None]) -> TableModel:
    """The same model; best: logits [R, V] -> what comes with them."""
    forward = target.forward

    def told(batch: PackedBatch, txn: Any, taps: Any = ()) -> Output:
        out = forward(batch, txn, taps)
        out.best = best(out.logits.numpy())
        return out

    target.forward = told  # type: ignore[method-assign]
    return target


def right(logits: np.ndarray) -> np.ndarray:
    return logits.argmax(-1)


def wrong(logits: np.ndarray) -> np.ndarray:
    return logits.argmin(-1)


def nothing(logits: np.ndarray) -> None:
    return None


PROMPTS = [[1, 2, 3, 4, 5, 1, 2, 3], [7], [2, 1, 2, 1, 2]]
CHAIN, TREE = "draft-model:tokens=3", "draft-model:tokens=4,branching=3"
DRAFTS = ["none", "prompt-lookup:min_ngram=1", CHAIN, TREE]


def said(best: Any, draft: str, constraint: Any = None, verify: Any = None, **params: Any) -> list:
    target, context = pair()
    more = {} if verify is None else {"verify": verify, "allow_lossy": True}
    llm = LLM(telling(target, best), draft=draft, context=context, **more)
    outputs = llm.generate(PROMPTS, max_tokens=24, constraint=constraint, **params)
    return [o.token_ids for o in outputs]


@pytest.mark.parametrize("draft", DRAFTS)
def test_untouched_rows_are_answered_from_it(draft: str) -> None:
    """Filters drop what is not the largest: they leave it the answer."""
    assert said(right, draft) == said(nothing, draft)
    assert said(right, draft, top_k=3, top_p=0.5) == said(nothing, draft)
    assert said(wrong, draft) != said(nothing, draft)


EDITS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.4},
    {"logit_bias": {3: 1.5}},
    {"allowed_token_ids": [1, 2, 3, 5, 8]},
    {"stop_token_ids": [4, 6], "min_tokens": 20},
    {"temperature": 0.8, "seed": 3},
]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("edit", EDITS, ids=lambda e: next(iter(e)))
def test_an_edited_row_never_gets_what_was_largest_before(edit: dict, draft: str) -> None:
    want = said(nothing, draft, **edit)
    assert said(wrong, draft, **edit) == want
    assert want != said(nothing, draft), "the edit changes something"


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_masked_row_never_gets_what_was_largest_before(draft: str) -> None:
    want = said(nothing, draft, lambda: ToyGrammar(11, 3))
    assert said(wrong, draft, lambda: ToyGrammar(11, 3)) == want


def test_a_bad_word_is_not_said_though_it_is_the_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    barred = Processors(SamplingParams(), [0], 1, bad_words=[[1]])
    p = ProcessedRows(
        Rows(logits, np.array([0]), np.array([1])), TokenTree.context([0]), barred, None
    )
    assert p.said is None
    assert p.greedy([0]) == [2]
    assert Greedy()(TokenTree.context([0]), p, SeqRng(0), 1).tokens == [2]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "rule",
    [
        *("rejection", "specinfer", "typical", "lexical-units:threshold=0.3"),
        *(Judge(torch.ones(4), -2.0), Reflective([1, 2], 0.6)),
    ],
    ids=lambda rule: getattr(rule, "name", rule),
)
def test_rules_with_opinions_of_their_own_say_the_same(rule: Any, temperature: float) -> None:
    """What they weigh or fuse is theirs; where they ask for the argmax it is that of the row."""
    want = said(nothing, CHAIN, verify=rule, temperature=temperature, seed=1)
    assert said(right, CHAIN, verify=rule, temperature=temperature, seed=1) == want
    if temperature:  # nobody asks for a largest logit
        assert said(wrong, CHAIN, verify=rule, temperature=temperature, seed=1) == want


@needs_kernels
@pytest.mark.parametrize("edit", [{}, *EDITS], ids=lambda e: next(iter(e), "none"))
def test_a_model_that_finds_it_says_what_it_said_before(edit: dict[str, Any]) -> None:
    model = FusedModel.random(Arch.llama(61, 32, 2, 4, 2, 48, max_positions=64), INT8, 5, gain=3)
    prompts = [[1, 2, 3, 1, 2, 3, 1], [5, 5]]
    found = []
    for way in (None, nothing):
        if way is not None:
            telling(model, way)  # type: ignore[arg-type]
        for draft in ("none", "prompt-lookup:min_ngram=1"):
            out = LLM(model, draft=draft).generate(prompts, max_tokens=20, **edit)
            found.append([o.token_ids for o in out])
    assert found[0] == found[1] == found[2] == found[3]
