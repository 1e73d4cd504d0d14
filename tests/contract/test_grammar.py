"""Constraints under speculation: the same text, whatever is drafted and whatever is forced."""

from __future__ import annotations

import pytest

import helpers_reference as reference
import methods
from foretell import LLM, SamplingParams
from helpers_grammar import ToyGrammar, allowed_after
from helpers_model import pair

PROMPTS = [[1, 2, 3, 1, 2, 3, 1], [5], [4, 4, 2, 4, 4]]


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
def test_output_is_that_of_plain_constrained_decoding(draft, temperature, force) -> None:
    for seed in range(4):
        target, context = pair(seed=seed)
        vocab = target.spec.vocab
        params = SamplingParams(
            max_tokens=24, temperature=temperature, seed=seed, frequency_penalty=0.3
        )
        llm = LLM(target, draft=draft, context=context, kv_rows=70)
        outputs = llm.generate(
            PROMPTS, params, constraint=lambda s=seed, v=vocab: ToyGrammar(v, s, force)
        )

        def mask(output, seed=seed, vocab=vocab):
            return allowed_after(output, vocab, seed)

        want = [reference.decode(target, p, params, mask=mask) for p in PROMPTS]
        assert [o.token_ids for o in outputs] == want


@pytest.mark.parametrize("draft", ["none", "draft-model:tokens=3"])
def test_forced_runs_save_forwards_and_respect_limits(draft: str) -> None:
    target, context = pair()
    llm = LLM(target, draft=draft, context=context)
    for limit in range(1, 15):
        params = SamplingParams(max_tokens=limit)
        steps = {}
        for force in (True, False):
            out = llm.generate(
                [PROMPTS[0]], params, constraint=lambda f=force: ToyGrammar(11, 3, f)
            )[0]
            assert len(out.token_ids) == limit
            assert len(out.samples[0].drafted) == limit
            steps[force] = out.stats.steps
        assert steps[True] <= steps[False]
    assert steps[True] < steps[False] or draft != "none"


@pytest.mark.parametrize("draft", ["none", "draft-model:tokens=3"])
def test_forced_tokens_have_logprobs_too(draft: str) -> None:
    target, context = pair()
    llm = LLM(target, draft=draft, context=context)
    params = SamplingParams(max_tokens=20, logprobs=2)
    out = llm.generate([PROMPTS[0]], params, constraint=lambda: ToyGrammar(11, 3))[0]
    text = [*out.prompt_ids, *out.token_ids]
    assert len(out.samples[0].logprobs) == len(out.token_ids)
    for i, (own, _) in enumerate(out.samples[0].logprobs, len(out.prompt_ids)):
        logs = target.logits(text[:i]).log_softmax(-1)
        assert own == pytest.approx(float(logs[text[i]]), abs=1e-5)
