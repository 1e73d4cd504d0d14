"""The service where things end, fail or come late; by what a client and its snapshot see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import helpers_reference as reference
from foretell import LLM, InputError, SamplingParams
from foretell.core.errors import ForetellError
from foretell.serve import job as jobs_module
from foretell.serve.job import Job
from foretell.serve.pace import Pace
from foretell.serve.service import Service
from foretell.serve.terms import Draining, Limits, Timeout
from helpers_model import TableModel
from helpers_service import LONG, PROMPT, run, serving


def plain(**options: Any) -> tuple[TableModel, LLM]:
    target = TableModel()
    return target, LLM(target, **options)


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.003)
    raise AssertionError("it does not come about")


def test_the_numbers_of_a_summary(monkeypatch) -> None:
    """Two samples that said something, and one that never got to it."""

    def sample(emitted: int, first: float, end: float) -> Any:
        stats = SimpleNamespace(emitted=emitted, first=first, end=end)
        return SimpleNamespace(stats=stats)

    samples = [sample(5, 103.0, 107.0), sample(3, 102.0, 0.0), sample(0, 0.0, 0.0)]
    request: Any = SimpleNamespace(sequences=samples, prompt=[1, 2, 3])
    ended = Job(None, request)  # type: ignore[arg-type]
    ended.arrived, ended.started, ended.reason = 100.0, 101.0, "length"
    monkeypatch.setattr(jobs_module.time, "perf_counter", lambda: 110.0)
    s = ended.summary()
    assert (s.id, s.reason, s.prompt_tokens, s.generated_tokens) == (ended.id, "length", 3, 8)
    assert (s.queue_s, s.first_token_s, s.latency_s) == (1.0, 2.0, 10.0)
    assert s.per_token_s == (4.0 + 8.0) / (8 - 2)
    request.sequences = samples[2:]
    ended.started = None
    s = ended.summary()
    assert (s.queue_s, s.first_token_s, s.per_token_s) == (10.0, None, None)


def test_only_requests_that_ran_to_their_end_say_how_long_one_takes() -> None:
    pace = Pace()
    assert pace.wait_for(50) == 1.0
    _, llm = plain(max_batch=1)

    async def body() -> None:
        async with serving(llm, Limits(max_queue=99)) as service:
            for _ in range(30):
                service.submit(PROMPT, SamplingParams(max_tokens=90)).cancel()
            await until(lambda: service.snapshot().requests_total["cancelled"] == 30)
            snap = service.snapshot()
            assert snap.requests_total["length"] == 0
            await service.submit(PROMPT, SamplingParams(max_tokens=3)).output()
            assert service.snapshot().requests_total["length"] == 1

    run(body)


def test_the_engine_is_ones_own_again_after_a_stop() -> None:
    _, llm = plain()
    alone = llm.engine.scheduler.on_admit

    async def body() -> None:
        async with serving(llm) as service:
            assert llm.engine.isolate
            await service.submit(PROMPT, SamplingParams(max_tokens=3)).output()
            await service.stop()
            with pytest.raises(Draining):
                service.submit(PROMPT, SamplingParams())

    run(body)
    assert not llm.engine.isolate
    assert llm.engine.scheduler.on_admit == alone
    nothing = SamplingParams(allowed_token_ids=[1], logit_bias={1: float("-inf")})
    with pytest.raises(InputError, match="Nothing is left"):
        llm.generate([PROMPT], nothing)


def test_a_stop_ends_what_runs_waits_and_grows() -> None:
    target, llm = plain(max_batch=1)
    target.on_forward = lambda batch, txn: time.sleep(0.004)

    async def body() -> None:
        service = Service(llm)
        await service.start()
        stream = service.open(SamplingParams(max_tokens=5), prompt=LONG)
        jobs = [service.submit(PROMPT, SamplingParams(max_tokens=99)) for _ in range(3)]
        await until(lambda: service.snapshot().running == 1)
        await service.stop()
        for job in jobs:
            with pytest.raises(Draining, match="stopped"):
                await job.output()
        assert stream.closed == "cancelled"
        snap = service.snapshot()
        assert (snap.running, snap.waiting, snap.streams, snap.kv_used) == (0, 0, 0, 0)
        assert snap.requests_total["error"] == 3
        assert not llm.engine.scheduler.growing
        await service.stop()  # once more: nothing happens

    run(body)


def test_a_stream_that_is_finished_while_the_server_drains_is_refused() -> None:
    target, llm = plain()
    target.on_forward = lambda batch, txn: time.sleep(0.004)

    async def body() -> None:
        async with serving(llm) as service:
            job = service.submit(PROMPT, SamplingParams(max_tokens=40))
            stream = service.open(SamplingParams(max_tokens=5), prompt=LONG)
            drain = asyncio.create_task(service.drain(20))
            await asyncio.sleep(0.01)
            with pytest.raises(Draining, match="no new requests"):
                stream.finish()
            assert stream.closed is None
            assert service.draining
            assert len((await job.output()).token_ids) == 40
            await drain

    run(body)


def test_a_stream_whose_beginning_is_refused_never_was() -> None:
    _, llm = plain(kv_rows=20)

    async def body() -> None:
        async with serving(llm, Limits(max_queue=1)) as service:
            for prompt in (LONG * 2, [*LONG, 99]):
                with pytest.raises(InputError):
                    service.open(SamplingParams(max_tokens=2), prompt=prompt)
                assert service.snapshot().streams == 0
            with pytest.raises(InputError, match="token id"):
                service.open(SamplingParams(logit_bias={99: 1.0}))
            await until(lambda: not llm.engine.scheduler.growing)
            stream = service.open(SamplingParams(max_tokens=2), prompt=LONG)
            with pytest.raises(InputError, match="room for 19"):
                stream.append([1] * 4)
            stream.append([1] * 2)
            assert len((await stream.finish().output()).token_ids) == 2

    run(body)


def test_a_later_request_may_have_to_be_done_earlier() -> None:
    target, llm = plain()
    target.on_forward = lambda batch, txn: time.sleep(0.004)

    async def body() -> None:
        async with serving(llm) as service:
            slow = [
                service.submit(PROMPT, SamplingParams(max_tokens=99), timeout=t)
                for t in (60, 0.1, 50, 0.05)
            ]
            for job in (slow[3], slow[1]):
                with pytest.raises(Timeout):
                    await job.output()
            assert [j.reason for j in slow] == [None, "timeout", None, "timeout"]
            assert service.snapshot().requests_total["timeout"] == 2

    run(body)


def test_prompt_logprobs_of_a_stream_are_whole() -> None:
    """Rows that were read while it grew have no logits any more: they are read again."""
    _, llm = plain()
    params = SamplingParams(max_tokens=3, prompt_logprobs=1)
    want = llm.generate([LONG], params)[0].prompt_logprobs

    async def body() -> None:
        async with serving(llm) as service:
            stream = service.open(params, prompt=LONG)
            await until(lambda: stream.rows == 15)
            job = stream.finish()
            out = await job.output()
            assert out.prompt_logprobs == job.prompt_logprobs == want
            assert out.stats.reused == 0

    run(body)


def failing(target: TableModel, times: int) -> None:
    """The next forwards fail."""
    left = [times]

    def broken(batch: Any, txn: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("out of order")

    target.on_forward = broken


def test_rows_of_a_request_that_failed_are_not_kept() -> None:
    target, llm = plain()

    async def body() -> None:
        async with serving(llm) as service:
            job = service.submit(LONG, SamplingParams(max_tokens=50))
            async for _ in job:
                failing(target, 1)
                break_at = job.stats().emitted
                if break_at:
                    break
        assert service.snapshot().kv_used == 0

    run(body)

    async def again() -> None:
        async with serving(llm) as service:
            before = service.snapshot().kv_kept
            target.on_forward = lambda batch, txn: time.sleep(0.002)
            job = service.submit([9, *LONG], SamplingParams(max_tokens=50))
            await until(lambda: service.snapshot().running == 1)
            failing(target, 1)
            with pytest.raises(ForetellError, match="failed on this request"):
                await job.output()
            assert service.snapshot().kv_kept == before
            assert job.reason == "error"

    run(again)


def test_a_growing_prompt_survives_a_step_that_fails() -> None:
    """Its rows are read again: what the step left in them nobody knows."""
    target, llm = plain()
    params = SamplingParams(max_tokens=5)

    async def body() -> None:
        async with serving(llm) as service:
            stream = service.open(params, prompt=LONG[:9])
            await until(lambda: stream.rows == 8)
            fed = target.rows_fed
            failing(target, 1)
            stream.append(LONG[9:])
            await until(lambda: stream.rows == 15)
            assert target.rows_fed == fed + 15
            out = await stream.finish().output()
            assert out.token_ids == reference.decode(target, LONG, params)

    run(body)


def test_samples_that_end_at_different_steps_are_all_delivered() -> None:
    """The request is over with its last sample, whichever that is."""
    _, llm = plain()
    params = SamplingParams(max_tokens=40, temperature=2.5, seed=1, n=4, stop_token_ids=[3])
    want = [s.token_ids for s in llm.generate([PROMPT], params)[0].samples]
    assert len({len(w) for w in want}) == 4

    async def body() -> None:
        async with serving(llm) as service:
            job = service.submit(PROMPT, params)
            got: list[list[int]] = [[], [], [], []]
            async for events in job:
                for e in events:
                    got[e.sample].append(e.token)
            assert [len(g) for g in got] == [len(w) for w in want]
            assert [s.token_ids for s in (await job.output()).samples] == want
            assert sum(service.snapshot().requests_total.values()) == 1

    run(body)
