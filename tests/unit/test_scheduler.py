"""Continuous batching: order, limits, preemption, and prefixes that are computed once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers_reference as reference
from foretell import LLM, InputError, SamplingParams
from foretell.engine.scheduler import shared
from helpers_model import TableModel, pair

LONG = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 3, 5, 7, 9, 2]


def watched(llm: LLM) -> dict[str, Any]:
    """Check the scheduler's promises at every step; returns what was seen."""
    scheduler, model = llm.engine.scheduler, llm.model
    seen: dict[str, Any] = {"steps": 0, "most": 0, "admitted": [], "stuck": 0}

    def forward(batch: Any, txn: Any) -> None:
        committed = sum(s.rows for s in scheduler.running)
        kept = sum(k.cache.n for k in scheduler.kept)
        assert committed + kept + batch.rows <= scheduler.rows, "more rows than the cache has"
        assert len(scheduler.running) <= scheduler.max_batch
        assert len(batch.segments) > 0

    model.on_forward = forward
    step, admit, plan = llm.engine.step, scheduler.on_admit, scheduler.plan

    def planned() -> list:
        decoding = {id(s) for s in scheduler.running if s.pending == 1}
        turns = plan()
        others = [id(t.seq) not in decoding for t in turns]
        assert others == sorted(others), "a prompt came before those who decode"
        assert sum(t.feed for t in turns if t.seq.pending > 1) <= scheduler.step_rows
        assert sum(t.feed for t in turns) <= scheduler.free, "what is planned does not fit"
        assert all(t.feed > 0 for t in turns), "a turn for nothing"
        assert all(t.decode == (t.feed == t.seq.pending) for t in turns)
        assert all(t.seq.view.cached == t.seq.rows for t in turns)
        return turns

    def checked() -> list:
        oldest = scheduler.running[0] if scheduler.running else None
        before = oldest and (oldest.rows, len(oldest.tokens))
        events = step()
        seen["steps"] += 1
        if oldest is not None and oldest.finish.reason is None:
            moved = (oldest.rows, len(oldest.tokens)) != before
            seen["stuck"] = 0 if moved else seen["stuck"] + 1
            assert seen["stuck"] <= 2, "the oldest sequence does not progress"
            assert oldest.stats.preempted == 0 or seen["admitted"][0] is not oldest
        return events

    def admitted(seq: Any) -> None:
        assert all(seq.request <= w.request for w in scheduler.waiting), "somebody overtook"
        seen["admitted"].append(seq)
        admit(seq)

    llm.engine.step = checked
    scheduler.on_admit = admitted
    scheduler.plan = planned
    return seen


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 16), st.integers(0, 10)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 15),
    st.integers(36, 90),
    st.integers(1, 5),
    st.integers(1, 25),
    st.sampled_from(["none", "prompt-lookup:min_ngram=1", "draft-model:tokens=3,branching=2"]),
)
def test_any_load_gets_through(requests, max_tokens, rows, max_batch, step_rows, draft) -> None:
    """No deadlock, never more rows than there are, the oldest always moves, first come first
    served, and every output is right."""
    target, context = pair()
    llm = LLM(
        target, draft=draft, context=context, kv_rows=rows, max_batch=max_batch, step_rows=step_rows
    )
    seen = watched(llm)
    prompts = [(LONG[:common] + [last] * own)[:20] for own, common, last in requests]
    params = SamplingParams(max_tokens=max_tokens)
    outputs = llm.generate(prompts, params)
    for prompt, out in zip(prompts, outputs, strict=True):
        assert out.token_ids == reference.decode(target, prompt, params)
    first = list(dict.fromkeys(s.request for s in seen["admitted"]))
    assert first == sorted(first), "a later request was admitted before an earlier one"
    assert llm.engine.scheduler.idle
    assert seen["steps"] < 40 * (len(prompts) + 1) * max_tokens


def test_a_request_that_can_never_fit_is_refused_with_a_sentence() -> None:
    llm = LLM(TableModel(), kv_rows=30)
    with pytest.raises(InputError, match="kv_rows") as e:
        llm.generate([LONG], max_tokens=15)
    assert "31" in str(e.value)
    assert "30" in str(e.value)
    assert llm.engine.scheduler.idle, "and leaves nothing behind"
    assert len(llm.generate([LONG], max_tokens=14)[0].token_ids) == 14
    with pytest.raises(InputError):
        llm.generate([[1], LONG], max_tokens=15)
    assert llm.engine.scheduler.idle


def test_requests_finish_in_order_of_arrival_when_alike() -> None:
    llm = LLM(TableModel(), max_batch=2)
    done = []

    def note(event: Any) -> None:
        if event.finish_reason:
            done.append(event.request)

    llm.generate([LONG] * 6, max_tokens=5, on_event=note)
    assert done == sorted(done)


def test_decoding_goes_on_while_prompts_are_filled() -> None:
    """A long prompt is read in chunks; those who decode get a token at every step."""
    target = TableModel()
    llm = LLM(target, step_rows=4)
    gaps: dict[int, list[int]] = {}
    steps = 0
    step = llm.engine.step

    def counted() -> list:
        nonlocal steps
        steps += 1
        return step()

    llm.engine.step = counted
    llm.generate(
        [[1, 2, 3], [i % 11 for i in range(60)]],
        max_tokens=20,
        on_event=lambda e: gaps.setdefault(e.request, []).append(steps),
    )
    first = gaps[0]
    assert [b - a for a, b in itertools.pairwise(first)] == [1] * 19
    assert target.widest <= 4 + 2


def test_decoding_takes_no_rows_from_prompts() -> None:
    """Those who decode come on top of `step_rows`."""
    llm = LLM(TableModel(), step_rows=4)
    scheduler, fed = llm.engine.scheduler, []
    plan = scheduler.plan

    def noted() -> list:
        turns = plan()
        fed.append([t.feed for t in turns if t.seq.request == 1])
        return turns

    scheduler.plan = noted
    llm.generate([[1, 2, 3], [i % 11 for i in range(21)]], max_tokens=20)
    assert fed[:7] == [[1], [4], [4], [4], [4], [4], [1]]


def rows_for(prompts: list[list[int]], **options: Any) -> tuple[TableModel, LLM]:
    target = TableModel()
    llm = LLM(target, **options)
    llm.generate(prompts, max_tokens=1)
    return target, llm


def test_a_shared_prefix_is_computed_once() -> None:
    """At the same time, one after the other, and in chunks."""
    a, b = [*LONG, 1, 1], [*LONG, 2, 2, 2]
    once = len(LONG)
    for options in ({}, {"step_rows": 5}, {"max_batch": 1}):
        target, _ = rows_for([a, b], **options)
        assert target.rows_fed == once + 2 + 3, options
        assert target.rows_copied == once
    target, llm = rows_for([a])
    out = llm.generate([b], max_tokens=1)[0]
    assert target.rows_fed == once + 2 + 3
    assert out.stats.reused == once


def test_n_samples_read_the_prompt_once() -> None:
    target = TableModel()
    LLM(target).generate([LONG], max_tokens=1, n=4, temperature=1.0, seed=1)
    assert target.rows_fed == len(LONG) + 3


def test_different_or_short_prefixes_are_not_shared() -> None:
    target, _ = rows_for([[1, 2, 3, 4], [1, 2, 3, 5], [9, *LONG], LONG])
    assert target.rows_fed == 4 + 4 + 17 + 16
    assert target.rows_copied == 0


def test_prompt_logprobs_need_every_row() -> None:
    target = TableModel()
    outputs = LLM(target).generate([LONG, LONG], max_tokens=1, prompt_logprobs=0)
    assert target.rows_fed == 2 * len(LONG)
    assert outputs[0].prompt_logprobs == outputs[1].prompt_logprobs


def test_a_follower_does_not_wait_for_a_leader_that_was_preempted() -> None:
    """The one that computes the shared prefix loses its rows: the other computes them itself."""
    target = TableModel()
    llm = LLM(target, step_rows=3, kv_rows=200)
    scheduler = llm.engine.scheduler
    step, state = llm.engine.step, {"steps": 0}

    def interfering() -> list:
        state["steps"] += 1
        if state["steps"] == 3:
            leader, follower = scheduler.running[1:3]
            assert leader.rows > 0
            assert follower.rows == 0
            scheduler.preempt(leader)
        return step()

    llm.engine.step = interfering
    prompts = [[7], [*LONG, 1], [*LONG, 2]]
    params = SamplingParams(max_tokens=12)
    outputs = llm.generate(prompts, params)
    assert [o.token_ids for o in outputs] == [reference.decode(target, p, params) for p in prompts]
    assert outputs[1].stats.preempted == 1


def test_kept_rows_give_way() -> None:
    """Rows of finished requests are reused if they can be and dropped when they are needed."""
    target = TableModel()
    llm = LLM(target, kv_rows=40)
    watched(llm)
    for first in range(8):
        prompt = [first, *LONG, 1, 2]
        out = llm.generate([prompt], max_tokens=20)[0]
        assert len(out.token_ids) == 20
    assert llm.engine.scheduler.spare <= 40


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_shared_counts_the_common_beginning(a: list[int], b: list[int]) -> None:
    want = 0
    while want < min(len(a), len(b)) and a[want] == b[want]:
        want += 1
    assert shared(a, b) == want


def test_the_youngest_gives_way_first() -> None:
    llm = LLM(TableModel(), kv_rows=15)
    scheduler, victims = llm.engine.scheduler, []
    preempt = scheduler.preempt

    def note(seq: Any) -> None:
        victims.append(seq.request)
        preempt(seq)

    scheduler.preempt = note
    llm.generate([[1, 2], [3, 4], [5, 6]], max_tokens=10)
    assert victims[0] == 2
    assert 0 not in victims
