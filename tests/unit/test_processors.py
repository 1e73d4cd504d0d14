"""Sampling processors against a slow reference, against transformers, and along tree paths."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers_reference as reference
from foretell import InputError, SamplingParams
from foretell.control.filters import filter_logits
from foretell.control.processed import ProcessedRows
from foretell.control.processors import Processors
from foretell.core.feedback import Rows
from foretell.core.protocols import NodeMasks
from foretell.core.tree import TokenTree

VOCAB = 12
PROMPT, OUTPUT = [1, 2, 3, 2], [4, 5, 4]


def logits(rows: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def ids(**limits) -> st.SearchStrategy:
    return st.lists(st.integers(0, VOCAB - 1), **limits)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    def maybe(strategy: st.SearchStrategy, off):
        return draw(st.one_of(st.just(off), strategy))

    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        repetition_penalty=maybe(st.floats(0.5, 2), 1.0),
        presence_penalty=maybe(st.floats(-2, 2), 0.0),
        frequency_penalty=maybe(st.floats(-2, 2), 0.0),
        logit_bias=maybe(st.dictionaries(st.integers(0, 8), st.floats(-5, 5), max_size=3), {}),
        allowed_token_ids=maybe(st.just([1, 2, 4, 5, 7, 9, 10, 11]), None),
        top_k=maybe(st.integers(1, VOCAB + 3), 0),
        top_p=maybe(st.floats(0.05, 1), 1.0),
        min_p=maybe(st.floats(0, 1), 0.0),
        typical_p=maybe(st.floats(0.05, 1), 1.0),
        min_tokens=maybe(st.integers(0, 8), 0),
    )


@settings(max_examples=300, deadline=None)
@given(params(), st.integers(0, 10**6), ids(max_size=4), ids(min_size=1, max_size=5), st.booleans())
def test_any_combination_equals_the_reference(p, seed, output, path, masked) -> None:
    """Every path gets its own context, however the rows are grouped."""
    stop_ids, bad = frozenset({0, 3}), [[6], [2, 8], [4, 5, 1]]
    tokens = [*PROMPT, *output]
    processors = Processors(p, tokens, len(PROMPT), stop_ids, bad)
    paths = [path[:i] for i in range(len(path) + 1)]
    x = logits(len(paths), seed).double()
    allowed = [t for t in range(VOCAB) if t % 5] if masked else None
    mask = None
    if masked:
        mask = torch.tensor([t in allowed for t in range(VOCAB)]).expand(len(paths), -1)
    got = processors.probs(x, paths, mask)
    for row, tail in enumerate(paths):
        context = (PROMPT, [*output, *tail], stop_ids, bad, allowed)
        raw = reference.processed(x[row].tolist(), p, *context)
        want = reference.filtered(raw, p)
        assert got[row].tolist() == pytest.approx(want, abs=1e-6)
        adjusted = processors.adjust(x, paths)[row].tolist()
        if not masked:
            assert adjusted == pytest.approx(raw, abs=1e-9)
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    "extra",
    [
        {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.7},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9},
        {"temperature": 1.3},
        {},
    ],
)
@pytest.mark.parametrize("vocab", [11, 1003, 4096])
def test_rows_are_the_same_alone_and_together(extra: dict, vocab: int) -> None:
    """Bit for bit: a node's distribution must not depend on which nodes are asked with it."""
    processors = Processors(SamplingParams(**{"temperature": 1.0, **extra}), [1, 2, 3, 1], 2)
    x, paths = logits(6, 0, vocab), [[], [4], [4, 5], [5], [4, 4], [4, 5, 1]]
    together = processors.probs(x, paths, None)
    for i, path in enumerate(paths):
        assert torch.equal(processors.probs(x[i : i + 1], [path], None)[0], together[i])
        apart = x[i].clone()[None]
        assert torch.equal(processors.probs(apart, [path], None)[0], together[i])


def test_the_raw_logits_are_left_alone() -> None:
    p = SamplingParams(temperature=0.5, top_k=3, presence_penalty=1.0, logit_bias={1: 2.0})
    x = logits(2, 1)
    before = x.clone()
    Processors(p, [1, 2], 1).probs(x, [[], [3]], None)
    assert torch.equal(x, before)


def test_committed_tokens_count_as_they_arrive() -> None:
    """The counts are kept between calls, over a live list of ids."""
    p = SamplingParams(frequency_penalty=1.0, presence_penalty=0.5, repetition_penalty=1.2)
    tokens = list(PROMPT)
    processors = Processors(p, tokens, len(PROMPT))
    x = logits(1, 2).double()
    for token in [5, 5, 2, 7, 5]:
        want = reference.processed(x[0].tolist(), p, PROMPT, tokens[len(PROMPT) :])
        assert processors.adjust(x, [[]])[0].tolist() == pytest.approx(want, abs=1e-9)
        want = reference.processed(x[0].tolist(), p, PROMPT, [*tokens[len(PROMPT) :], 9, token])
        assert processors.adjust(x, [[9, token]])[0].tolist() == pytest.approx(want, abs=1e-9)
        tokens.append(token)


def test_nothing_but_temperature_is_plain() -> None:
    def made(**extra) -> Processors:
        return Processors(SamplingParams(**extra), [1], 1, frozenset({2}))

    assert made().plain
    assert made(temperature=0.5).plain
    for extra in (
        {"top_k": 1},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"typical_p": 0.5},
        {"presence_penalty": 1},
        {"frequency_penalty": 1},
        {"repetition_penalty": 2},
        {"logit_bias": {1: 1}},
        {"allowed_token_ids": [1]},
        {"min_tokens": 1},
    ):
        assert not made(**extra).plain, extra


def warper(name: str, value: float):
    t = pytest.importorskip("transformers")
    return {
        "temperature": t.TemperatureLogitsWarper,
        "top_k": t.TopKLogitsWarper,
        "top_p": t.TopPLogitsWarper,
        "min_p": t.MinPLogitsWarper,
        "typical_p": t.TypicalLogitsWarper,
        "repetition_penalty": t.RepetitionPenaltyLogitsProcessor,
    }[name](value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [0.3, 2.0]),
        ("top_k", [1, 7, 50]),
        ("top_p", [0.1, 0.5, 0.95]),
        ("min_p", [0.02, 0.5]),
        ("typical_p", [0.2, 0.9]),
        ("repetition_penalty", [0.7, 1.5]),
    ],
)
def test_each_processor_agrees_with_transformers(name: str, values: list[float]) -> None:
    text = torch.tensor([[3, 9, 3, 20]] * 20)
    for value in values:
        x = logits(20, 3, 40)
        p = SamplingParams(**{"temperature": 1.0, name: value})
        processors = Processors(p, text[0].tolist(), 2)
        want = warper(name, value)(text, x.clone()).softmax(-1)
        torch.testing.assert_close(processors.probs(x, [[]] * 20, None), want)


def test_the_order_of_the_filters_is_that_of_transformers() -> None:
    p = SamplingParams(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05, typical_p=0.8)
    x = logits(50, 4, 40)
    want = x.clone()
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
        want = warper(name, getattr(p, name))(None, want)
    torch.testing.assert_close(Processors(p, [1], 1).probs(x, [[]] * 50, None), want.softmax(-1))


def test_something_always_stays_possible() -> None:
    for seed in range(30):
        r = random.Random(seed)
        p = SamplingParams(
            top_k=r.choice([0, 1]), top_p=1e-9, min_p=1.0, typical_p=1e-9, temperature=1e-3
        )
        probs = Processors(p, [1], 1).probs(logits(4, seed), [[]] * 4, None)
        assert torch.isfinite(probs).all()
        assert (probs.sum(-1) - 1).abs().max() < 1e-5


def test_top_k_keeps_ties_and_top_p_the_lowest_ids() -> None:
    x = torch.zeros(1, 5)
    assert filter_logits(x, SamplingParams(top_k=2)).isfinite().sum() == 5
    kept = filter_logits(x, SamplingParams(top_p=0.39)).isfinite()[0]
    assert kept.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("vocab", [31, 32, 33, 70])
def test_rows_of_a_tree_get_their_paths_and_masks(vocab: int) -> None:
    """Constraint masks are bits, 32 ids a word, lowest bit first."""
    tree = TokenTree.build([1, 2], [3, 4, 5], [-1, 0, 0])
    r = random.Random(vocab)
    allowed = [sorted(r.sample(range(vocab), 9)) for _ in range(len(tree))]
    bits = np.zeros((len(tree), (vocab + 31) // 32), np.uint32)
    for node, row in enumerate(allowed):
        for t in row:
            bits[node, t // 32] |= np.uint32(1) << np.uint32(t % 32)
    masks = NodeMasks(bits.view(np.int32), np.ones(len(tree), bool))
    p = SamplingParams(temperature=0.9, frequency_penalty=0.5)
    processors = Processors(p, [1, 2], 1)
    packed = logits(7, 5, vocab)
    rows = Rows(packed, np.array([-1, 2, 3, 4, 6]))
    view = ProcessedRows(rows, tree, processors, masks)
    nodes = [1, 2, 3, 4]
    probs = view.probs(nodes)
    for i, (node, at) in enumerate(zip(nodes, (2, 3, 4, 6), strict=True)):
        output = [2, *tree.path_tokens(node)]
        raw = reference.processed(packed[at].tolist(), p, [1], output, allowed=allowed[node])
        assert probs[i].tolist() == pytest.approx(reference.filtered(raw, p), abs=1e-6)
        assert view.greedy([node]) == [raw.index(max(raw))]
    assert view.greedy(nodes) == [view.greedy([n])[0] for n in nodes]


def test_minus_infinity_bias_forbids() -> None:
    p = SamplingParams(temperature=1.0, logit_bias={2: -math.inf})
    probs = Processors(p, [1], 1).probs(logits(1, 0), [[]], None)
    assert probs[0, 2] == 0


def test_forbidding_everything_is_said_in_a_sentence() -> None:
    params = SamplingParams(allowed_token_ids=[4], logit_bias={4: -math.inf}, temperature=1.0)
    processors = Processors(params, [*PROMPT], len(PROMPT))
    with pytest.raises(InputError, match="forbid every token"):
        processors.probs(logits(2, 0), [[], []], None)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy_and_finite(temperature: float) -> None:
    processors = Processors(SamplingParams(temperature=temperature), [*PROMPT], len(PROMPT))
    raw = logits(3, 1)
    p = processors.probs(raw, [[], [], []], None)
    assert p.argmax(-1).tolist() == raw.argmax(-1).tolist()
    assert p.max(-1).values.tolist() == [1.0, 1.0, 1.0]
