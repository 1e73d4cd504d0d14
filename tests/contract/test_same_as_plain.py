"""`exact` means: token for token the output of plain decoding, greedy and sampled."""

from __future__ import annotations

import random
from typing import Any

import pytest

import helpers_reference as reference
import methods
from foretell import LLM, SamplingParams
from foretell.core import registry
from foretell.core.registry import Spec
from helpers_model import TableModel, pair

LONG = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
PROMPTS = [LONG, [7], [*LONG, 4, 5, 9, 9], [3, 1, 3, 1, 3, 1, 3], [*LONG[:9], 2, 2]]


def run(draft: str, prompts: list[list[int]], params: SamplingParams, **options: Any):
    target, context = pair()
    llm = LLM(target, draft=draft, context=context, **options)
    outputs = llm.generate(prompts, params)
    return llm, [o.token_ids for o in outputs], outputs


def expected(prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    target, _ = pair()
    return [reference.decode(target, p, params) for p in prompts]


def settings() -> list[Any]:
    """Every drafter with the default policy, every policy with the drafters that have scores."""
    pairs = [(d, "fixed") for d in methods.ALL_DRAFTERS]
    pairs += [("draft-model:tokens=4,branching=3", p) for p in methods.ALL_POLICIES[1:]]
    return [pytest.param(d, p, id=f"{d} {p}") for d, p in pairs]


GREEDY = SamplingParams(max_tokens=30)
SAMPLED = SamplingParams(max_tokens=30, temperature=0.8, seed=5)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "replay"])
@pytest.mark.parametrize(("draft", "policy"), settings())
class TestSameTokens:
    def test_one_request(self, draft: str, policy: str, params: SamplingParams) -> None:
        for prompt, want in zip(PROMPTS, expected(PROMPTS, params), strict=True):
            _, got, outputs = run(draft, [prompt], params, policy=policy)
            assert got == [want]
            assert outputs[0].promise == "exact"

    def test_ragged_batch_in_any_order(self, draft, policy, params) -> None:
        want = expected(PROMPTS, params)
        for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
            _, got, _ = run(draft, [PROMPTS[i] for i in order], params, policy=policy)
            assert got == [want[i] for i in order]

    def test_chunked_prefill(self, draft, policy, params) -> None:
        for rows in (1, 5):
            _, got, _ = run(draft, PROMPTS, params, policy=policy, step_rows=rows)
            assert got == expected(PROMPTS, params)

    def test_preemption(self, draft, policy, params) -> None:
        """A cache that cannot hold all sequences at their full length."""
        _, got, outputs = run(draft, PROMPTS, params, policy=policy, kv_rows=60)
        assert got == expected(PROMPTS, params)
        assert any(o.stats.preempted for o in outputs)

    def test_small_batches_take_turns(self, draft, policy, params) -> None:
        _, got, _ = run(draft, PROMPTS, params, policy=policy, max_batch=2)
        assert got == expected(PROMPTS, params)


@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_replay_equals_plain_sampling_for_many_seeds(draft: str) -> None:
    target, context = pair(seed=3)
    llm = LLM(target, draft=draft, context=context)
    for seed in range(40):
        params = SamplingParams(max_tokens=16, temperature=1.0, seed=seed)
        got = llm.generate([LONG], params)[0].token_ids
        assert got == reference.decode(target, LONG, params), seed


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_the_tests_speculate(draft: str, temperature: float) -> None:
    """Equality would prove nothing if no draft was ever accepted, or none ever refused."""
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=1)
    _, _, outputs = run(draft, PROMPTS, params)
    accepted = sum(o.stats.accepted for o in outputs)
    drafted = sum(o.stats.drafted for o in outputs)
    assert 0 < accepted < drafted


PROCESSED = {
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "filters": {"top_k": 6, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
    "bias": {"logit_bias": {3: 2.0, 4: -3.0, 5: float("-inf")}, "allowed_token_ids": range(1, 10)},
    "stop ids": {"stop_token_ids": (4, 6), "min_tokens": 9},
    "frequency": {"frequency_penalty": 1.5},
}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("processors", PROCESSED)
@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_processors_see_each_nodes_own_path(draft, processors, temperature) -> None:
    for seed in range(2 if temperature else 1):
        params = SamplingParams(
            max_tokens=25, temperature=temperature, seed=seed, **PROCESSED[processors]
        )
        _, got, _ = run(draft, PROMPTS, params)
        assert got == expected(PROMPTS, params)


def clocked(draft: str) -> bool:
    """Which draws a rule sees depends on the clock, so a seed does not repeat its tokens under one;
    the law is tested elsewhere."""
    return getattr(registry.lookup("drafter", Spec.parse(draft).name), "clocked", False)


@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
@pytest.mark.parametrize("verify", ["replay", "rejection"])
def test_a_seed_means_the_same_in_any_company(draft: str, verify: str) -> None:
    if verify == "rejection" and clocked(draft):
        return
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=11)
    alone = [run(draft, [p], params, verify=verify)[1][0] for p in PROMPTS]
    together = run(draft, PROMPTS, params, verify=verify)[1]
    crowded = run(draft, PROMPTS[::-1], params, verify=verify, max_batch=2, step_rows=4)[1]
    assert together == alone
    assert crowded[::-1] == alone


@pytest.mark.parametrize("draft", ["none", "draft-model:tokens=3"])
def test_preemption_does_not_change_a_rejection_sampled_output(draft: str) -> None:
    params = SamplingParams(max_tokens=25, temperature=1.0, seed=2)
    calm = run(draft, PROMPTS, params, verify="rejection", policy="fixed:tokens=1")[1]
    _, tight, outputs = run(
        draft, PROMPTS, params, verify="rejection", policy="fixed:tokens=1", kv_rows=70
    )
    assert any(o.stats.preempted for o in outputs)
    if draft == "none":
        assert tight == calm


@pytest.mark.parametrize("draft", methods.ALL_DRAFTERS)
@pytest.mark.parametrize("verify", ["replay", "rejection"])
def test_n_samples_differ_and_repeat(draft: str, verify: str) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=4, n=4)
    first, second = (run(draft, [LONG], params, verify=verify)[2][0] for _ in range(2))
    texts = [s.token_ids for s in first.samples]
    assert len({tuple(t) for t in texts}) == 4
    if verify == "rejection" and clocked(draft):
        return
    assert texts == [s.token_ids for s in second.samples]
    one = run(draft, [LONG], SamplingParams(max_tokens=12, temperature=1.0, seed=4), verify=verify)
    assert texts[0] == one[1][0], "sample 0 keeps the request's seed"
    again = SamplingParams(max_tokens=12, temperature=1.0, seed=first.samples[2].seed)
    assert run(draft, [LONG], again, verify=verify)[1][0] == texts[2], "a sample's seed repeats it"


@pytest.mark.parametrize("draft", methods.SPECULATIVE)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_plain_decoding(draft: str, temperature: float) -> None:
    params = SamplingParams(
        max_tokens=15, temperature=temperature, seed=1, logprobs=3, prompt_logprobs=2
    )
    plain = run("none", PROMPTS, params)[2]
    for options in ({}, {"step_rows": 4}, {"kv_rows": 50}):
        for a, b in zip(plain, run(draft, PROMPTS, params, **options)[2], strict=True):
            assert a.samples[0].logprobs == b.samples[0].logprobs
            assert a.prompt_logprobs == b.prompt_logprobs
    target, _ = pair()
    for o in plain:
        text = [*o.prompt_ids, *o.token_ids]
        assert o.prompt_logprobs[0] is None
        rows = [*o.prompt_logprobs[1:], *o.samples[0].logprobs]
        for i, (own, top) in enumerate(rows, 1):
            logs = target.logits(text[:i]).log_softmax(-1)
            assert own == pytest.approx(float(logs[text[i]]), abs=1e-5)
            assert [t for t, _ in top] == logs.topk(len(top)).indices.tolist()
        assert len(rows) == len(text) - 1


def test_models_without_trees_get_chains() -> None:
    from foretell.core.protocols import Caps

    target, context = pair(caps=Caps(tree=False))
    llm = LLM(target, draft="draft-model:tokens=4,branching=3", context=context)
    for params in (GREEDY, SAMPLED):
        got = [o.token_ids for o in llm.generate(PROMPTS, params)]
        assert got == expected(PROMPTS, params)


def test_models_without_rollback_decode_plainly_and_refuse_drafts() -> None:
    from foretell import InputError
    from foretell.core.protocols import Caps

    target, context = pair(caps=Caps(rollback=False))
    llm = LLM(target, context=context)
    got = [o.token_ids for o in llm.generate(PROMPTS, GREEDY)]
    assert got == expected(PROMPTS, GREEDY)
    with pytest.raises(InputError, match="undo"):
        LLM(target, draft="prompt-lookup", context=context)


@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_random_loads(draft: str) -> None:
    """Random prompts, limits and parameters at once."""
    for seed in range(12):
        r = random.Random(seed)
        target, context = pair(vocab=8, seed=seed)
        prompts = [[r.randrange(8) for _ in range(r.randint(1, 20))] for _ in range(7)]
        prompts[3] = prompts[2][:9] + prompts[3]
        params = SamplingParams(
            max_tokens=r.randint(1, 25),
            temperature=r.choice([0.0, 0.7, 1.3]),
            seed=seed,
            top_k=r.choice([0, 5]),
            presence_penalty=r.choice([0.0, 0.7]),
            stop_token_ids=r.choice([(), (3,)]),
        )
        llm = LLM(
            target,
            draft=draft,
            context=context,
            max_batch=r.randint(1, 7),
            step_rows=r.randint(1, 30),
            kv_rows=r.randint(55, 200),
            policy=r.choice(methods.FOR_ANY_DRAFTER),
        )
        got = [o.token_ids for o in llm.generate(prompts, params)]
        assert got == [reference.decode(target, p, params) for p in prompts], seed


def test_positions_end_where_the_context_ends() -> None:
    """Neither target nor drafter is asked about a position it does not have."""
    target = TableModel(max_positions=40)
    draft = TableModel(order=2, seed=1, like=target, max_positions=30)  # shorter than the target's
    from foretell.core.protocols import BuildContext

    context = BuildContext(target, None, lambda path: draft, "toy")
    llm = LLM(target, draft="draft-model:tokens=6", context=context)
    params = SamplingParams(max_tokens=100)
    out = llm.generate([LONG], params)[0]
    assert out.token_ids == reference.decode(target, LONG, params)
    assert len(out.token_ids) == 40 - len(LONG)
    assert out.finish_reason == "length"
