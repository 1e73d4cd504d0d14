"""Every lossless rule keeps the target's law through the whole engine, as `rejection` does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import methods
from foretell import LLM, SamplingParams
from foretell.core.rng import Purpose
from foretell.engine import inputs
from helpers_exact import total_variation
from helpers_grammar import allowed_after
from helpers_model import pair
from helpers_rng import used_twice, watched
from test_law import FLOAT32, SAMPLE, chi_square, engine_law, sample, target_law

CHAIN = "draft-model:tokens=2"
TREE = "draft-model:tokens=1,branching=2"
RULES = [name for name in methods.LOSSLESS if name != "rejection"]
PAIRS = [(v, d) for v in RULES for d in (CHAIN, TREE) if (v, d) != ("block", TREE)]


@pytest.mark.parametrize(("verify", "draft"), PAIRS)
def test_two_tokens_have_exactly_the_targets_law(monkeypatch, verify: str, draft: str) -> None:
    params = SamplingParams(**SAMPLE)
    law, target, prompt = engine_law(monkeypatch, draft, params, verify=verify)
    assert total_variation(law, target_law(target, prompt, params)) < FLOAT32


@pytest.mark.parametrize(
    "extra",
    [
        {"temperature": 1.7, "top_k": 2},
        {"repetition_penalty": 1.8, "presence_penalty": 0.4, "frequency_penalty": 0.6},
        {"logit_bias": {1: 1.5}, "stop_token_ids": (2,), "min_tokens": 1},
    ],
    ids=["top_k", "penalties", "stops"],
)
@pytest.mark.parametrize(("verify", "draft"), PAIRS)
def test_law_with_sampling_processors(monkeypatch, verify, draft, extra: dict) -> None:
    params = SamplingParams(**{**SAMPLE, **extra})
    law, target, prompt = engine_law(monkeypatch, draft, params, seed=2, verify=verify)
    assert total_variation(law, target_law(target, prompt, params)) < FLOAT32


@pytest.mark.parametrize(("verify", "draft"), PAIRS)
def test_law_under_a_grammar(monkeypatch, verify: str, draft: str) -> None:
    params = SamplingParams(**SAMPLE)
    grammar = {"seed": 1, "force": False}
    law, target, prompt = engine_law(monkeypatch, draft, params, grammar=grammar, verify=verify)
    vocab = target.spec.vocab
    want = target_law(target, prompt, params, lambda out: allowed_after(out, vocab, 1))
    assert total_variation(law, want) < FLOAT32


def sampled_cases() -> list[Any]:
    cases = [(v, d) for v in RULES for d in ("draft-model:tokens=4", "draft-model:tokens=2")]
    trees = {v: f"draft-model:tokens=3,branching={3}" for v in RULES if v != "block"}
    often = {("block", "draft-model:tokens=4"), *trees.items()}
    return [
        pytest.param(*c, marks=() if c in often else pytest.mark.slow, id=" ".join(c))
        for c in [*cases, *trees.items()]
    ]


@pytest.mark.stat
@pytest.mark.parametrize(("verify", "draft"), sampled_cases())
def test_sampled_law_of_three_tokens(verify: str, draft: str) -> None:
    """The real random numbers: shared or reused noise would correlate tokens or rounds."""
    params = SamplingParams(max_tokens=3, temperature=0.9)
    counts, law = sample(draft, params, 2000, verify)
    assert chi_square(counts, law) > 1e-3


@pytest.mark.parametrize("draft", ["draft-model:tokens=4", "draft-model:tokens=3,branching=3"])
@pytest.mark.parametrize("verify", RULES)
def test_no_random_number_is_used_twice(monkeypatch, verify: str, draft: str) -> None:
    if verify == "block" and "branching" in draft:
        pytest.skip("block verifies chains")
    used: Counter = Counter()
    monkeypatch.setattr(inputs, "SeqRng", watched(used))
    target, context = pair()
    llm = LLM(target, draft=draft, verify=verify, context=context)
    llm.generate([[1, 2, 3, 1, 2]], max_tokens=60, temperature=1.0, seed=3)
    assert len(used) > 20
    assert not used_twice(used)
    assert not [k for k in used if k[0] == Purpose.TARGET], "the target's noise is for replay"
