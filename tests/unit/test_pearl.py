"""The pipelined loop: the same text and the same law, with draft and target side by side."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import helpers_reference as reference
from foretell import LLM, InputError, SamplingParams
from foretell.control.length.pearl import Pearl
from foretell.core.params import SamplingParams as Params
from foretell.core.protocols import BuildContext, Load, SeqView, Timings
from foretell.core.rng import SeqRng
from foretell.core.tree import TokenTree
from foretell.engine.pipelined import imagined, rest
from helpers_grammar import ToyGrammar, allowed_after
from helpers_model import TableModel, pair

PROMPTS = [[1, 2, 3, 1, 2], [7], [4, 4, 1, 2, 9, 9, 3]]


def agreeing(agreement: float, seed: int = 0) -> tuple[TableModel, TableModel, BuildContext]:
    target = TableModel(seed=seed)
    draft = TableModel(seed=seed + 1, like=target, agreement=agreement)
    return target, draft, BuildContext(target, None, lambda path: draft, "twin")


def test_drafter_and_target_run_at_the_same_time_and_no_step_waits_for_a_draft() -> None:
    """Each forward of the target waits until the drafter has run, which would never end if the
    drafter ran first or afterwards in the same thread."""
    target, draft, context = agreeing(1.0)
    llm = LLM(target, draft="draft-model:tokens=4", policy="pearl:tokens=4", context=context)
    seen, mine = threading.Event(), threading.current_thread()
    others = set()

    def drafting(batch: Any, txn: Any) -> None:
        others.add(threading.current_thread() is mine)
        seen.set()

    def verifying(batch: Any, txn: Any) -> None:
        assert threading.current_thread() is mine
        if target.forwards in (1, 2, 3):  # the first reads the prompt, the last need no draft
            assert seen.wait(10), "the drafter did not start while the target was running"
            seen.clear()

    draft.on_forward, target.on_forward = drafting, verifying
    params = SamplingParams(max_tokens=40)
    out = llm.generate([PROMPTS[0]], params)[0]
    assert out.token_ids == reference.decode(target, PROMPTS[0], params)
    assert others == {False}


@pytest.mark.parametrize("agreement", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_blocks_follow_blocks_while_they_stand(agreement: float, temperature: float) -> None:
    target, _, context = agreeing(agreement)
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=3)
    llm = LLM(target, draft="draft-model:tokens=5", policy="pearl:tokens=5", context=context)
    outputs = llm.generate(PROMPTS, params)
    assert [o.token_ids for o in outputs] == [reference.decode(target, p, params) for p in PROMPTS]
    tokens = sum(o.stats.emitted for o in outputs) / sum(o.stats.steps for o in outputs)
    if agreement == 1.0:
        # the first token of each block is the target's own: 5 a step once the pipeline is full
        assert tokens > 4
    elif agreement:
        assert tokens > 1.1


@pytest.mark.parametrize("seed", range(6))
def test_constraints_stops_and_limits(seed: int) -> None:
    target, context = pair(seed=seed)
    vocab = target.spec.vocab
    for temperature in (0.0, 0.9):
        params = SamplingParams(
            max_tokens=3 + 5 * seed,
            temperature=temperature,
            seed=seed,
            frequency_penalty=0.3,
            stop_token_ids=(seed,),
            top_k=7,
        )
        llm = LLM(
            target, draft="draft-model:tokens=3", policy="pearl:tokens=4", context=context,
            kv_rows=60, max_batch=2, step_rows=4,
        )  # fmt: skip
        plain = [o.token_ids for o in llm.generate(PROMPTS, params)]
        assert plain == [reference.decode(target, p, params) for p in PROMPTS]
        free = SamplingParams(max_tokens=20, temperature=temperature, seed=seed)
        forced = llm.generate(PROMPTS, free, constraint=lambda: ToyGrammar(vocab, seed, True))
        want = [
            reference.decode(target, p, free, mask=lambda out: allowed_after(out, vocab, seed))
            for p in PROMPTS
        ]
        assert [o.token_ids for o in forced] == want


@pytest.mark.parametrize("verify", ["rejection", "block"])
def test_sampled_text_has_the_targets_law(verify: str) -> None:
    """Four tokens: a plain step, a step with what is left of a block, and one more."""
    target, context = pair(vocab=3, seed=1, sharpness=1.0)
    llm = LLM(
        target,
        draft="draft-model:tokens=3",
        verify=verify,
        policy="pearl:tokens=3",
        context=context,
        max_batch=64,
    )
    n, counts, drafted = 3000, Counter(), 0
    for start in range(0, n, 500):
        params = SamplingParams(max_tokens=4, temperature=1.0, seed=start, n=500)
        for s in llm.generate([[0, 1, 2]], params)[0].samples:
            counts[tuple(s.token_ids)] += 1
            drafted += s.stats.accepted
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        law = {
            (*t, x): w * float(p)
            for t, w in law.items()
            for x, p in enumerate(target.next_probs([0, 1, 2, *t]))
        }
    big = [t for t, w in law.items() if n * w >= 5]
    observed, wanted = [counts[t] for t in big], [n * law[t] for t in big]
    observed.append(n - sum(observed))
    wanted.append(n - sum(wanted))
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3
    assert drafted > n / 10, "the test would prove nothing without drafts"


def test_an_error_of_the_drafter_comes_out_and_leaves_the_engine_usable() -> None:
    target, draft, context = agreeing(0.8)
    llm = LLM(target, draft="draft-model:tokens=3", policy="pearl", context=context)
    params = SamplingParams(max_tokens=12)

    def broken(batch: Any, txn: Any) -> None:
        raise RuntimeError("the drafter fell over")

    draft.on_forward = broken
    with pytest.raises(RuntimeError, match="fell over"):
        llm.generate(PROMPTS, params)

    def both(batch: Any, txn: Any) -> None:
        raise KeyError("the target, too")

    target.on_forward = both
    with pytest.raises(KeyError):
        llm.generate(PROMPTS[1:2], params)
    draft.on_forward = target.on_forward = lambda batch, txn: None
    assert llm.engine.scheduler.idle
    got = [o.token_ids for o in llm.generate(PROMPTS, params)]
    assert got == [reference.decode(target, p, params) for p in PROMPTS]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_target_leaves_no_thread_behind(failure: type[BaseException]) -> None:
    target, _, context = agreeing(0.8)
    llm = LLM(target, draft="draft-model:tokens=3", policy="pearl", context=context)
    params = SamplingParams(max_tokens=12)
    want = [reference.decode(target, p, params) for p in PROMPTS]

    def stop(batch: Any, txn: Any) -> None:
        if target.forwards == 3:
            raise failure

    target.on_forward = stop
    with pytest.raises(failure):
        llm.generate(PROMPTS, params)
    assert not [t for t in threading.enumerate() if t.name == "drafter"]
    target.on_forward = lambda batch, txn: None
    assert [o.token_ids for o in llm.generate(PROMPTS, params)] == want


def test_drafters_and_models_it_cannot_use_are_refused() -> None:
    target, context = pair()
    with pytest.raises(InputError, match="draft-model"):
        LLM(target, draft="prompt-lookup", policy="pearl", context=context)
    same = BuildContext(target, None, lambda path: target, "itself")
    with pytest.raises(InputError, match="one model"):
        LLM(target, draft="draft-model", policy="pearl", context=same)
    with pytest.raises(InputError):
        Pearl(tokens=0)


def test_a_block_takes_as_long_as_a_forward_of_the_target() -> None:
    policy = Pearl(most=8)
    assert policy.block == 4
    policy.drafted(4, 0.4)
    policy.observe([], [], Timings(target=0.5))
    assert policy.block == 5
    policy.drafted(0, 9.0)
    assert policy.block == 5
    for _ in range(200):
        policy.observe([], [], Timings(target=5.0))
    assert policy.block == 8
    (budget,) = policy.budgets([None], Load())  # type: ignore[list-item]
    assert (budget.depth, budget.branching) == (8, 1)


def test_what_is_left_of_a_block() -> None:
    q = torch.eye(4)[[1, 2, 3]]
    tree = TokenTree.chain([9, 9], [1, 2, 3], q=q, score=[0.5, 0.6, 0.7])
    left = rest(tree, [1], 1, 8)
    assert left.tokens.tolist() == [1, 2, 3]
    assert left.q is not None
    assert left.qrow is not None
    assert torch.equal(left.q[left.qrow[1:].tolist()], q[1:])
    assert left.score is not None
    assert np.allclose(left.score[1:], [0.6, 0.7])
    assert rest(tree, [1], 1, 1).tokens.tolist() == [1, 2]
    assert rest(tree, [3], 3, 5).drafted == 0
    assert rest(TokenTree.chain([9], [1, 2]), [1], 1, 5).q is None


def test_an_imagined_view_knows_the_whole_block() -> None:
    asked = []

    def warp(logits: torch.Tensor, paths: Any) -> torch.Tensor:
        asked.append(paths)
        return logits

    view = SeqView([1, 2], 2, Params(), SeqRng(0), warp=warp)
    other = imagined(view, [5, 6])
    other.warp(torch.zeros(1, 3), [[7]])
    assert asked == [[[5, 6, 7]]]
    assert (other.tokens, view.tokens) == ([1, 2, 5, 6], [1, 2])
    assert imagined(view, []).tokens is not view.tokens
