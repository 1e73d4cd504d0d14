"""Lossless means: exactly the target's distribution, through the whole engine.

Small cases are enumerated: every draw of the drafter and of the verifier branches, with its exact
probability, over all rounds of a request. Larger ones are sampled and tested with chi-square.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

import helpers_reference as reference
import methods
from foretell import LLM, SamplingParams
from foretell.core.rng import Purpose, SeqRng
from foretell.drafters.trees import draw
from foretell.engine import inputs
from helpers_drafts import without_replacement
from helpers_exact import Branch, outcomes, total_variation
from helpers_grammar import ToyGrammar, allowed_after
from helpers_model import TableModel, pair
from helpers_rng import used_twice, watched

FLOAT32 = 2e-6  # the engine's distributions are float32


class BranchRng:
    """Stands in for a sequence's `SeqRng`: draws branch instead of being drawn."""

    def __init__(self, branch: Branch) -> None:
        self.branch, self.seed = branch, 0

    def flip(self, p: float, w: float, position: int, index: int) -> bool:
        return self.branch.flip(p, w)

    def pick(self, p: torch.Tensor, position: int) -> int:
        return self.branch.pick(p)


def _ranked(q, view, how, levels, orders, width):
    """`draw.ranked`, every draw branching; tokens of probability 0 fill the rows up."""
    ids = torch.empty(len(q), min(width, q.shape[-1]), dtype=torch.int64)
    for i, row in enumerate(q):
        drawn = without_replacement(view.rng.branch, row, width)
        rest = [t for t in range(len(row)) if t not in drawn]
        ids[i] = torch.tensor([*drawn, *rest][: ids.shape[1]])
    return ids, q.gather(-1, ids)


def _independent(q, view, levels, orders, width):
    """`draw.independent`, every draw branching."""
    return torch.tensor([[view.rng.branch.pick(row) for _ in range(width)] for row in q])


def engine_law(
    monkeypatch: pytest.MonkeyPatch, draft: str, params: SamplingParams, **options: Any
) -> tuple[dict[tuple[int, ...], float], TableModel, list[int]]:
    """The exact law of a request's output."""
    vocab, grammar = options.pop("vocab", 3), options.pop("grammar", None)
    prompt = [0, 1, 2, 0, 1]
    target, context = pair(vocab, seed=options.pop("seed", 0), sharpness=1.0)
    monkeypatch.setattr(draw, "ranked", _ranked)
    monkeypatch.setattr(draw, "independent", _independent)
    verify = options.pop("verify", "rejection")
    llm = LLM(target, draft=draft, verify=verify, context=context, **options)

    def run(branch: Branch) -> tuple[int, ...]:
        class Rng(BranchRng):
            def __init__(self, seed: int) -> None:
                super().__init__(branch)

            def fork(self, index: int) -> int:
                return 0

        monkeypatch.setattr(inputs, "SeqRng", Rng)
        constraint = None if grammar is None else lambda: ToyGrammar(vocab, **grammar)
        return tuple(llm.generate([prompt], params, constraint=constraint)[0].token_ids)

    return outcomes(run), target, prompt


def target_law(target, prompt, params, mask=None) -> dict[tuple[int, ...], float]:
    law: dict[tuple[int, ...], float] = {(): 1.0}
    done: dict[tuple[int, ...], float] = {}
    while law:
        longer: dict[tuple[int, ...], float] = {}
        for text, w in law.items():
            probs = reference.law(
                target, prompt, list(text), params, params.stop_token_ids, mask=mask
            )
            for t, q in enumerate(probs):
                if q > 0:
                    ended = t in params.stop_token_ids or len(text) + 1 == params.max_tokens
                    (done if ended else longer)[(*text, t)] = w * q
        law = longer
    return done


SAMPLE: dict[str, Any] = {"max_tokens": 2, "temperature": 1.0, "seed": 1}
ENUMERATED = [
    "none",
    "prompt-lookup:min_ngram=1,tokens=2",
    "draft-model:tokens=1",
    "draft-model:tokens=2",
    "draft-model:tokens=1,branching=2",
    "draft-model:tokens=1,branching=3",
]


@pytest.mark.parametrize("draft", ENUMERATED)
def test_two_tokens_have_exactly_the_targets_law(monkeypatch, draft: str) -> None:
    """Two tokens come out of one round, or of two: drafts refused in the first do not bias the
    second."""
    params = SamplingParams(**SAMPLE)
    law, target, prompt = engine_law(monkeypatch, draft, params)
    assert total_variation(law, target_law(target, prompt, params)) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["draft-model:tokens=2,branching=2", "draft-model:tokens=2"])
def test_three_tokens_have_exactly_the_targets_law(monkeypatch, draft: str) -> None:
    params = SamplingParams(**{**SAMPLE, "max_tokens": 3})
    law, target, prompt = engine_law(monkeypatch, draft, params)
    assert total_variation(law, target_law(target, prompt, params)) < FLOAT32


@pytest.mark.parametrize(
    "extra",
    [
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 2},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"typical_p": 0.6},
        {"repetition_penalty": 1.8, "presence_penalty": 0.4, "frequency_penalty": 0.6},
        {"logit_bias": {1: 1.5}, "stop_token_ids": (2,), "min_tokens": 1},
    ],
    ids=lambda extra: ",".join(extra),
)
@pytest.mark.parametrize("draft", ["draft-model:tokens=2", "draft-model:tokens=1,branching=2"])
def test_law_with_sampling_processors(monkeypatch, draft: str, extra: dict) -> None:
    params = SamplingParams(**{**SAMPLE, **extra})
    law, target, prompt = engine_law(monkeypatch, draft, params, seed=2)
    assert total_variation(law, target_law(target, prompt, params)) < FLOAT32


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("draft", ["draft-model:tokens=2", "draft-model:tokens=1,branching=2"])
def test_law_under_a_grammar(monkeypatch, draft: str, force: bool) -> None:
    """Forbidden drafts are killed, not forgotten; forced runs are taken without a draw."""
    for seed in range(3):
        params = SamplingParams(**{**SAMPLE, "max_tokens": 3 if force else 2})
        grammar = {"seed": seed, "force": force}
        law, target, prompt = engine_law(
            monkeypatch, draft, params, vocab=4 if not force else 3, grammar=grammar
        )
        vocab = target.spec.vocab
        want = target_law(
            target, prompt, params, lambda out, v=vocab, s=seed: allowed_after(out, v, s)
        )
        assert total_variation(law, want) < FLOAT32
        if draft.endswith("=2") and "branching" in draft:
            break


@pytest.mark.parametrize(
    "policy",
    [
        "confidence:threshold=0.5",
        "fixed:nodes=2",
        "specdec++:threshold=0.5",
        "entropy:gamma=0.4",
    ],
)
@pytest.mark.parametrize("draft", ["draft-model:tokens=2", "draft-model:tokens=2,branching=2"])
def test_policies_do_not_bend_the_law(monkeypatch, draft: str, policy: str) -> None:
    if "branching" in draft and not policy.startswith("fixed"):
        policy += ",tokens=1"
    params = SamplingParams(**SAMPLE)
    law, target, prompt = engine_law(monkeypatch, draft, params, policy=policy)
    assert total_variation(law, target_law(target, prompt, params)) < FLOAT32


@pytest.mark.parametrize("verify", ["rejection", "block"])
def test_what_is_left_of_a_pipelined_block_keeps_the_law(monkeypatch, verify: str) -> None:
    """A plain step; then, where the target said the block's first token, a step with the second."""
    params = SamplingParams(**{**SAMPLE, "max_tokens": 3})
    law, target, prompt = engine_law(
        monkeypatch, "draft-model:tokens=2", params, policy="pearl:tokens=2", verify=verify
    )
    assert total_variation(law, target_law(target, prompt, params)) < FLOAT32


def chi_square(counts: Counter, law: dict[Any, float]) -> float:
    """p-value; cells that expect fewer than 5 are pooled."""
    n = sum(counts.values())
    assert set(counts) <= set(law), "something impossible was sampled"
    big = [k for k, w in law.items() if n * w >= 5]
    observed = [counts[k] for k in big]
    wanted = [n * law[k] for k in big]
    rest = n - sum(wanted)
    if rest > 1e-6 * n:
        observed.append(n - sum(observed))
        wanted.append(rest)
    scale = sum(observed) / sum(wanted)
    return float(stats.chisquare(observed, [w * scale for w in wanted]).pvalue)


def sample(draft: str, params: SamplingParams, runs: int, verify: str) -> tuple[Counter, dict]:
    target, context = pair(vocab=4, seed=1, sharpness=1.0)
    prompt = [0, 1, 2, 3, 0, 1]
    llm = LLM(target, draft=draft, verify=verify, context=context, max_batch=64)
    counts: Counter = Counter()
    for seed in range(runs // 500):
        many = replace(params, n=500, seed=seed)
        counts.update(tuple(s.token_ids) for s in llm.generate([prompt], many)[0].samples)
    return counts, target_law(target, prompt, params)


def sampled_cases() -> list[Any]:
    """All drafters under rejection; under replay, which is exact token for token, only two."""
    often = ["none rejection", "none replay", "draft-model:tokens=4,branching=3 rejection"]
    cases = [(d, "rejection") for d in methods.ALL_DRAFTERS]
    cases += [(d, "replay") for d in ("none", "draft-model:tokens=4")]
    return [
        pytest.param(*c, marks=() if " ".join(c) in often else pytest.mark.slow, id=" ".join(c))
        for c in cases
    ]


@pytest.mark.stat
@pytest.mark.parametrize(("draft", "verify"), sampled_cases())
def test_sampled_law_of_three_tokens(draft: str, verify: str) -> None:
    """The real random numbers: shared or reused noise would correlate tokens or rounds."""
    params = SamplingParams(max_tokens=3, temperature=0.9)
    counts, law = sample(draft, params, 2000, verify)
    assert chi_square(counts, law) > 1e-3


@pytest.mark.stat
def test_the_statistical_test_sees_a_broken_rule(monkeypatch) -> None:
    """Accepting 1.3 times too often: the chi-square test above fails on it."""
    flip = SeqRng.flip
    monkeypatch.setattr(SeqRng, "flip", lambda s, p, w, at, i: flip(s, p * 1.3, w, at, i))
    params = SamplingParams(max_tokens=3, temperature=0.9)
    counts, law = sample("draft-model:tokens=4", params, 2000, "rejection")
    assert chi_square(counts, law) < 1e-3


@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_no_random_number_is_used_twice(monkeypatch, draft: str) -> None:
    """Within a request every draw has a key of its own: across siblings, levels and rounds."""
    used: Counter = Counter()
    monkeypatch.setattr(inputs, "SeqRng", watched(used))
    target, context = pair()
    llm = LLM(target, draft=draft, verify="rejection", context=context)
    llm.generate([[1, 2, 3, 1, 2]], max_tokens=60, temperature=1.0, seed=3)
    assert used, "nothing was drawn"
    assert not used_twice(used)
    assert not [k for k in used if k[0] == Purpose.TARGET], "the target's noise is for replay"
