"""Prompts that grow beside running requests: the scheduler without a server around it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers_reference as reference
from foretell import LLM, SamplingParams
from foretell.core.protocols import Caps
from foretell.models.native.arch import Arch
from foretell.models.native.runner import NativeModel
from helpers_model import TableModel, pair

LONG = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 3, 5, 7, 9, 2]
PARAMS = SamplingParams(max_tokens=6)


class Desk:
    """An engine, prompts that grow, and requests; every step is checked."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.scheduler = llm, llm.engine.scheduler
        self.model: Any = llm.model
        self.streams: list[Any] = []
        self.requests: list[Any] = []
        self.model.on_forward = self._forward

    def _forward(self, batch: Any, txn: Any) -> None:
        s = self.scheduler
        live = {id(q): q.cache.n for q in [*s.running, *s.waiting, *self.streams] if q.cache}
        held = sum(live.values()) + sum(k.cache.n for k in s.kept)
        assert held == s.used == s.rows - s.free, "a row is counted twice, or not at all"
        assert held + batch.rows <= s.rows, "more rows than the cache has"

    def open(self, tokens: list[int]) -> Any:
        seq = self.llm.inputs.open_prompt()
        self.streams.append(seq)
        self.scheduler.grow(seq)
        self.scheduler.replace(seq, tokens)
        return seq

    def submit(self, prompt: list[int], cache: Any = None, params: SamplingParams = PARAMS) -> Any:
        request = self.llm.inputs.request(prompt, params, None)
        seq = request.sequences[0]
        if cache is not None and cache.n:
            seq.cache, seq.view.cached = cache, cache.n
        self.scheduler.add(seq)
        self.requests.append((prompt, seq))
        return seq

    def finish(self, seq: Any) -> Any:
        tokens = list(seq.tokens)
        cache = self.scheduler.release(seq)
        assert seq.cache is None, "two would write into one cache"
        self.streams.remove(seq)
        return self.submit(tokens, cache)

    def step(self) -> bool:
        before = self.model.logit_rows
        self.llm.engine.step()
        turns = self.llm.engine.turns
        if all(t.seq.open for t in turns):
            assert self.model.logit_rows == before, "a growing prompt is not decoded"
        for t in turns:
            assert t.seq.view.cached == t.seq.rows
        for seq in self.streams:
            assert seq.rows <= max(0, len(seq.tokens) - 1), "its last id may change"
            assert seq.view.cached == seq.rows
            if seq.cache is not None:
                seq.cache.check()
                assert seq.cache.tokens == seq.tokens[: seq.rows], "rows of another text"
        return bool(turns)

    def settle(self) -> None:
        for _ in range(400):
            if not self.step() and self.scheduler.idle:
                return
        raise AssertionError("it never comes to rest")

    def check(self) -> None:
        assert self.requests
        for prompt, seq in self.requests:
            assert seq.output == reference.decode(self.model, prompt, seq.params)


TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "append", "correct", "finish", "drop", "request", "step"]),
            st.integers(0, 9),
            TOKENS,
        ),
        max_size=25,
    ),
    st.integers(40, 90),
    st.integers(1, 3),
    st.integers(2, 20),
    st.booleans(),
)
def test_any_history_says_what_the_last_prompts_say(ops, rows, max_batch, step_rows, undo) -> None:
    target, context = pair()
    if not undo:
        target = TableModel(caps=Caps(rollback=False))
    draft = "draft-model:tokens=3" if undo else "none"
    desk = Desk(
        LLM(
            target,
            draft=draft,
            context=context,
            kv_rows=rows,
            max_batch=max_batch,
            step_rows=step_rows,
        )
    )
    scheduler = desk.scheduler
    for op, which, tokens in ops:
        seq = desk.streams[which % len(desk.streams)] if desk.streams else None
        if op == "open" and len(desk.streams) < 4:
            desk.open([*LONG[: which % 9], *tokens])
        elif op == "request":
            desk.submit([*LONG[: which % 9], *tokens])
        elif op == "step" or seq is None:
            desk.step()
        elif op == "append" and len(seq.tokens) < 24:
            assert scheduler.replace(seq, [*seq.tokens, *tokens[:4]]) == 0
        elif op == "correct":
            had, keep = seq.rows, min(seq.rows, which)
            lost = scheduler.replace(seq, [*seq.tokens[:which], *tokens])
            assert 0 <= lost <= had
            if undo:
                assert lost <= had - keep, "rows of the common beginning stay"
        elif op == "finish":
            desk.finish(seq)
        elif op == "drop":
            desk.streams.remove(seq)
            if (cache := scheduler.release(seq)) is not None:
                scheduler.keep(seq.tokens, cache)
    for seq in list(desk.streams):
        desk.finish(seq)
    desk.submit(LONG)
    desk.settle()
    desk.check()


def test_a_model_that_cannot_undo_rows_reads_a_corrected_prompt_anew() -> None:
    model = TableModel(caps=Caps(rollback=False))
    desk = Desk(LLM(model))
    seq = desk.open(LONG)
    desk.settle()
    assert seq.rows == 15
    assert desk.scheduler.replace(seq, [*LONG[:4], 9, 9, 9]) == 15
    desk.settle()
    assert seq.rows == 6
    desk.finish(seq)
    desk.settle()
    desk.check()


def test_growing_prompts_leave_the_rows_that_waiting_requests_need() -> None:
    desk = Desk(LLM(TableModel(), kv_rows=60, max_batch=1))
    desk.submit([7, 8, 9], params=SamplingParams(max_tokens=12))
    desk.step()
    desk.submit([9, *LONG])
    seq = desk.open([5, *LONG, *LONG, *LONG])
    for _ in range(5):
        desk.step()
        assert seq.rows <= 60 - desk.scheduler.running[0].rows - 18
    assert seq.rows == 0, "and read nothing by halves"
    desk.scheduler.replace(seq, [5, *LONG])
    desk.step()
    assert seq.rows == 16
    desk.settle()
    desk.check()
    assert seq.stats.preempted == 0


def test_a_growing_prompt_reads_what_the_step_has_left() -> None:
    """Chunks of the step's rows, behind the prompts that run; several share them in order."""
    desk = Desk(LLM(TableModel(), step_rows=6))
    a, b = desk.open([1, *LONG]), desk.open([2, *LONG])
    seen = []
    for _ in range(6):
        desk.step()
        seen.append((a.rows, b.rows))
    assert seen == [(6, 0), (12, 0), (16, 2), (16, 8), (16, 14), (16, 16)]
    desk.scheduler.replace(a, [1, *LONG, *LONG])
    desk.submit([3, 3, 3, 3])
    desk.step()
    assert a.rows == 16 + 2
    desk.settle()
    desk.check()


def test_a_growing_prompt_takes_over_what_is_there() -> None:
    desk = Desk(LLM(TableModel()))
    first = desk.open([*LONG, 1])
    desk.settle()
    fed = desk.model.rows_fed
    second = desk.open([*LONG, 2, 2, 2])
    desk.settle()
    assert (second.rows, second.stats.reused) == (18, 16)
    assert desk.model.rows_fed == fed + 2
    desk.finish(first)
    desk.settle()
    desk.submit([*LONG, 1, 5])  # from kept rows, as a request does
    desk.settle()
    assert desk.requests[-1][1].stats.reused == 17
    desk.check()


def test_the_rows_of_growing_prompts_go_before_anybody_is_preempted() -> None:
    desk = Desk(LLM(TableModel(), kv_rows=50, max_batch=2))
    old, new = desk.open([1, *LONG]), desk.open([2, *LONG])
    desk.settle()
    assert (old.rows, new.rows) == (16, 16)
    running = desk.submit([3, *LONG], params=SamplingParams(max_tokens=10))
    desk.step()
    assert running.rows == 17
    for _ in range(9):
        desk.step()
    assert running.finish.reason == "length"
    assert running.stats.preempted == 0
    assert (old.stats.preempted, new.stats.preempted) == (0, 1), "the youngest gives way"
    assert desk.scheduler.preempted == 1
    desk.check()


def test_a_cache_that_waits_is_counted_and_given_up_last_come_first() -> None:
    """Complete prompts that wait for a place keep their rows unless somebody needs them."""
    desk = Desk(LLM(TableModel(), kv_rows=60, max_batch=1))
    running = desk.submit([7, 8], params=SamplingParams(max_tokens=25))
    desk.step()
    streams = [desk.open([i, *LONG[:11]]) for i in (1, 2, 3)]
    for _ in range(4):
        desk.step()
    waiting = [desk.finish(s) for s in streams]
    assert [w.rows for w in waiting] == [11, 11, 11]
    assert desk.scheduler.set_aside == 33
    desk.settle()
    assert running.stats.preempted == 0
    assert [w.stats.preempted for w in waiting] == [0, 0, 0]
    desk.check()
    assert desk.scheduler.set_aside == 0


def test_who_is_dropped_while_waiting_leaves_no_rows_behind() -> None:
    desk = Desk(LLM(TableModel(), kv_rows=60, max_batch=1))
    desk.submit([7, 8], params=SamplingParams(max_tokens=25))
    stream = desk.open(LONG)
    desk.step()
    waiting = desk.finish(stream)
    assert desk.scheduler.set_aside == waiting.rows == 15
    desk.scheduler.retire(waiting)
    assert (desk.scheduler.set_aside, waiting.cache, waiting.view.cached) == (0, None, 0)
    desk.requests.pop()
    desk.settle()
    desk.check()


def test_no_more_kept_rows_are_given_up_than_needed() -> None:
    llm = LLM(TableModel(), kv_rows=60)
    for i in (1, 2):
        llm.generate([[i, *LONG]], max_tokens=1)
    scheduler = llm.engine.scheduler
    assert (scheduler.spare, scheduler.free) == (34, 26)
    assert scheduler.shed(26)
    assert scheduler.spare == 34
    assert scheduler.shed(27)
    assert scheduler.spare == 17
    assert not scheduler.shed(61)
    assert scheduler.spare == 0


def test_kept_rows_count_as_free() -> None:
    """They are given up as soon as a draft wants their place."""
    target, context = pair()
    llm = LLM(target, draft="draft-model:tokens=3", context=context, kv_rows=40)
    for i in range(4):
        llm.generate([[i, *LONG]], max_tokens=10)
    scheduler = llm.engine.scheduler
    assert scheduler.spare > 20
    assert scheduler.load().free_rows == 40
    assert scheduler.used == scheduler.spare
    out = llm.generate([[9, 9, *LONG]], max_tokens=10)[0]
    assert out.stats.drafted > 9


def test_a_cache_without_rollback_is_never_kept() -> None:
    llm = LLM(TableModel(caps=Caps(rollback=False)))
    llm.generate([LONG], max_tokens=4)
    assert llm.engine.scheduler.spare == 0
    assert llm.generate([LONG], max_tokens=4)[0].stats.reused == 0


def test_room_that_a_finished_request_did_not_use_is_given_back() -> None:
    llm = LLM(NativeModel.random(Arch.llama(37, 16, 1, 2, 1, 20), torch.float32), kv_rows=2000)
    llm.generate([LONG], max_tokens=900, stop_token_ids=list(range(37)), ignore_eos=True)
    (kept,) = llm.engine.scheduler.kept
    assert kept.cache.n == len(kept.tokens) == llm.engine.scheduler.spare == 16
    assert kept.cache.capacity <= 16 + 8 + 64
    kept.cache.check()
    first = llm.generate([LONG], max_tokens=5)[0]
    again = LLM(llm.model).generate([LONG], max_tokens=5)[0]
    assert first.stats.reused == 15
    assert first.token_ids == again.token_ids


def test_the_oldest_is_never_stopped_by_those_who_decode() -> None:
    """They come first in a step and may leave less than its chunk: it takes what there is."""
    desk = Desk(LLM(TableModel(), kv_rows=22, step_rows=8))
    old = desk.submit([1, *LONG, 1, 1, 1], params=SamplingParams(max_tokens=2))
    young = desk.submit([9], params=SamplingParams(max_tokens=20))
    rows = []
    while old.finish.reason is None:
        desk.step()
        rows.append(old.rows)
    assert rows[:2] == [8, 16]
    assert all(b > a for a, b in itertools.pairwise(rows[:-1])), rows
    assert old.stats.preempted == 0
    desk.settle()
    desk.check()
    assert young.finish.reason == "length"
