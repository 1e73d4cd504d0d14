"""The engine behind a thread: events, cancellation, limits, failures, growing prompts."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import helpers_reference as reference
from foretell import LLM, InputError, SamplingParams
from foretell.core.errors import ForetellError
from foretell.core.params import Speculation
from foretell.serve.service import Service
from foretell.serve.terms import Draining, JobSummary, Limits, QueueFull, Timeout
from helpers_model import Letters, TableModel, pair
from helpers_service import LONG, PROMPT, run, serving


def speculative(**options: Any) -> tuple[TableModel, LLM]:
    target, context = pair()
    return target, LLM(target, draft="draft-model:tokens=3", context=context, **options)


def slow(target: TableModel, seconds: float = 0.004) -> TableModel:
    """Every forward takes a while, so that there is something to interrupt."""
    target.on_forward = lambda batch, txn: time.sleep(seconds)
    return target


async def settled(service: Service) -> None:
    """Wait until the engine's thread has taken every command and sleeps."""
    for _ in range(500):
        s = service.snapshot()
        if not s.running and not s.waiting and not service.worker.commands:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"still busy: {service.snapshot()}")


class TestAnswers:
    @pytest.mark.parametrize("again", range(8))  # the engine's thread may be a step ahead, or not
    def test_every_sample_says_what_generate_says_one_event_a_token(self, again: int) -> None:
        _, llm = speculative()
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=2)
        want = llm.generate([PROMPT], params)[0]

        async def body() -> None:
            async with serving(llm) as service:
                job = service.submit(PROMPT, params)
                got: list[list[int]] = [[], []]
                ends = []
                async for events in job:
                    for e in events:
                        assert e.index == len(got[e.sample])
                        got[e.sample].append(e.token)
                        ends += [e.finish_reason] if e.finish_reason else []
                assert got == [s.token_ids for s in want.samples]
                assert ends == ["length", "length"]
                assert job.reason == "length"
                out = await job.output()
                assert [s.token_ids for s in out.samples] == got
                assert job.speculation(1) == {
                    **out.samples[1].stats.speculation("draft-model", "replay"),
                    "promise": "exact",
                    "why_off": None,
                }

        run(body)

    def test_many_at_once_say_what_each_says_alone(self) -> None:
        target, llm = speculative(kv_rows=90, max_batch=5, step_rows=7)
        params = SamplingParams(max_tokens=15)
        prompts = [[i % 3, *LONG[: i % 13], 3] for i in range(32)]

        async def body() -> None:
            async with serving(llm) as service:
                jobs = [service.submit(p, params) for p in prompts]
                outs = await asyncio.gather(*(j.output() for j in jobs))
                for p, out in zip(prompts, outs, strict=True):
                    assert out.token_ids == reference.decode(target, p, params)
                snap = service.snapshot()
                assert snap.preemptions_total > 0, "the small cache forces preemption"
                assert snap.prefix_hit_tokens_total > 0
                assert snap.generated_tokens_total == 32 * 15
                assert snap.prompt_tokens_total == sum(map(len, prompts))
                assert snap.requests_total["length"] == 32
                assert snap.accepted_tokens_total == sum(snap.accepted_per_pos)
                assert snap.num_drafts_total <= sum(snap.draft_lengths.values())
                assert snap.kv_used == 0
                assert 0 < snap.kv_kept <= snap.kv_rows == 90

        run(body)

    def test_the_thread_sleeps_when_there_is_nothing_to_do(self) -> None:
        _, llm = speculative()

        async def body() -> None:
            async with serving(llm) as service:
                await service.submit(PROMPT, SamplingParams(max_tokens=5)).output()
                steps = service.snapshot().steps_total
                used = time.process_time()
                await asyncio.sleep(0.3)
                assert service.snapshot().steps_total == steps
                assert time.process_time() - used < 0.1, "it waits busily"

        run(body)

    def test_one_call_to_the_loop_for_each_step(self) -> None:
        _, llm = speculative(max_batch=8)

        async def body() -> None:
            async with serving(llm) as service:
                calls = []
                deliver = service.worker.deliver
                service.worker.deliver = lambda batch, over: (  # type: ignore
                    calls.append(len(batch)),
                    deliver(batch, over),
                )
                jobs = [service.submit(PROMPT, SamplingParams(max_tokens=30)) for _ in range(8)]
                await asyncio.gather(*(j.output() for j in jobs))
                assert len(calls) <= service.snapshot().steps_total
                assert max(calls) == 8

        run(body)

    def test_summaries_for_histograms(self) -> None:
        _, llm = speculative()
        seen: list[JobSummary] = []

        async def body() -> None:
            async with serving(llm, on_done=seen.append) as service:
                await service.submit(PROMPT, SamplingParams(max_tokens=9)).output()

        run(body)
        (s,) = seen
        assert (s.reason, s.prompt_tokens, s.generated_tokens) == ("length", 6, 9)
        assert s.first_token_s is not None
        assert s.per_token_s is not None
        assert 0 <= s.queue_s <= s.first_token_s <= s.latency_s


class TestEndingEarly:
    def test_cancel_within_one_step_and_nothing_leaks(self) -> None:
        target, llm = speculative(max_batch=3)
        steps = llm.engine.totals

        async def body() -> None:
            async with serving(llm) as service:
                slow(target, 0.02)
                jobs = [service.submit(PROMPT, SamplingParams(max_tokens=60)) for _ in range(5)]
                async for _ in jobs[0]:
                    break  # closing the iterator is a client that went away
                await asyncio.sleep(0.03)
                for job in jobs:
                    job.cancel()
                    job.cancel()
                before = steps.steps
                outs = await asyncio.gather(*(j.output() for j in jobs))
                assert steps.steps <= before + 1
                assert {j.reason for j in jobs} == {"cancelled"}
                assert {o.finish_reason for o in outs} == {"cancelled"}
                await settled(service)
                snap = service.snapshot()
                assert (snap.running, snap.waiting, snap.kv_used) == (0, 0, 0)
                assert snap.requests_total["cancelled"] == 5
                assert service.worker.jobs == {}
                assert not service.alive
                assert not service.worker.queued
                target.on_forward = lambda batch, txn: None
                again = await service.submit(PROMPT, SamplingParams(max_tokens=9)).output()
                assert again.token_ids == reference.decode(
                    target, PROMPT, SamplingParams(max_tokens=9)
                )

        run(body)

    def test_a_task_that_is_cancelled_cancels_its_request(self) -> None:
        target, llm = speculative()
        slow(target)

        async def body() -> None:
            async with serving(llm) as service:
                job = service.submit(PROMPT, SamplingParams(max_tokens=60))
                task = asyncio.create_task(job.output())
                await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await settled(service)
                assert job.reason == "cancelled"

        run(body)

    def test_two_hundred_clients_that_leave(self) -> None:
        _, llm = speculative(max_batch=4, kv_rows=300)

        async def client(service: Service, i: int) -> None:
            job = service.submit([i % 11, *LONG], SamplingParams(max_tokens=40))
            seen = 0
            async for events in job:
                seen += len(events)
                if seen > i % 7:
                    return

        async def body() -> None:
            async with serving(llm, Limits(max_queue=250)) as service:
                await asyncio.gather(*(client(service, i) for i in range(200)))
                await settled(service)
                snap = service.snapshot()
                assert (snap.running, snap.waiting, snap.kv_used) == (0, 0, 0)
                assert snap.kv_kept <= 300
                assert service.worker.jobs == {}
                assert not service.alive
                assert not [s for k in llm.engine.scheduler.kept for s in [k] if s.cache.open]  # type: ignore[attr-defined]

        run(body)

    @pytest.mark.parametrize("by", ["request", "limits"])
    def test_timeouts(self, by: str) -> None:
        target, llm = speculative(max_batch=1)
        slow(target, 0.01)
        limits = Limits(timeout=0.05 if by == "limits" else None)
        own = 0.05 if by == "request" else 99

        async def body() -> None:
            async with serving(llm, limits) as service:
                jobs = [
                    service.submit(PROMPT, SamplingParams(max_tokens=99), timeout=own)
                    for _ in range(2)
                ]
                start = time.perf_counter()
                with pytest.raises(Timeout, match="seconds"):
                    async for _ in jobs[0]:
                        pass
                with pytest.raises(Timeout):  # it never got out of the queue
                    await jobs[1].output()
                assert 0.04 < time.perf_counter() - start < 1
                assert [j.reason for j in jobs] == ["timeout"] * 2
                await settled(service)
                assert service.snapshot().kv_used == 0

        run(body)

    def test_the_queue_has_an_end(self) -> None:
        target, llm = speculative(max_batch=1)
        slow(target)

        async def body() -> None:
            async with serving(llm, Limits(max_queue=2)) as service:
                params = SamplingParams(max_tokens=30)
                jobs = [service.submit(PROMPT, params) for _ in range(3)]  # one has a place
                with pytest.raises(QueueFull, match="wait already") as e:
                    service.submit(PROMPT, params)
                assert 1 <= e.value.retry_after <= 60
                await asyncio.gather(*(j.output() for j in jobs))
                await service.submit(PROMPT, params).output()

        run(body)

    def test_draining_finishes_what_is_there(self) -> None:
        target, llm = speculative(max_batch=1)
        slow(target, 0.002)

        async def body() -> None:
            async with serving(llm) as service:
                jobs = [service.submit(PROMPT, SamplingParams(max_tokens=20)) for _ in range(3)]
                tasks = [asyncio.create_task(j.output()) for j in jobs]
                drain = asyncio.create_task(service.drain(30))
                await asyncio.sleep(0)
                with pytest.raises(Draining):
                    service.submit(PROMPT, SamplingParams())
                with pytest.raises(Draining):
                    service.open(SamplingParams())
                await drain
                assert [len((await t).token_ids) for t in tasks] == [20] * 3

        run(body)

    def test_draining_ends_when_its_time_is_up(self) -> None:
        target, llm = speculative()
        slow(target, 0.01)

        async def body() -> None:
            async with serving(llm) as service:
                job = service.submit(PROMPT, SamplingParams(max_tokens=100))
                start = time.perf_counter()
                await service.drain(0.1)
                assert time.perf_counter() - start < 1
                with pytest.raises(Draining, match="stopped"):
                    await job.output()

        run(body)
        assert llm.engine.scheduler.idle
        out = llm.generate([PROMPT], max_tokens=5)  # the engine is whole
        assert len(out[0].token_ids) == 5


class TestFailures:
    def test_a_verdict_that_fails_is_the_affair_of_its_request(self) -> None:
        """One forbids every token; the others do not notice."""
        target, llm = speculative()
        params = SamplingParams(max_tokens=12)
        nothing = SamplingParams(
            max_tokens=12, allowed_token_ids=[1], logit_bias={1: float("-inf")}
        )

        async def body() -> None:
            async with serving(llm) as service:
                good = [service.submit(PROMPT, params), service.submit(LONG, params)]
                bad = service.submit(PROMPT, nothing)
                with pytest.raises(InputError, match="Nothing is left to say"):
                    await bad.output()
                for job, prompt in zip(good, (PROMPT, LONG), strict=True):
                    assert (await job.output()).token_ids == reference.decode(
                        target, prompt, params
                    )
                await settled(service)
                assert service.snapshot().kv_used == 0
                assert bad.reason == "error"

        run(body)

    @pytest.mark.parametrize("where", ["forward", "propose", "observe", "begin"])
    def test_a_step_that_fails_does_not_end_the_server(self, where: str) -> None:
        target, llm = speculative()
        params = SamplingParams(max_tokens=12)

        def broken(*_: Any) -> Any:
            raise RuntimeError("out of order\nwith details")

        async def body() -> None:
            async with serving(llm) as service:
                place: Any = target if where == "forward" else llm.drafter
                whole = getattr(place, "on_forward" if where == "forward" else where)
                setattr(place, "on_forward" if where == "forward" else where, broken)
                jobs = [service.submit(p, params) for p in (PROMPT, LONG)]
                for job in jobs:
                    with pytest.raises(ForetellError, match="failed on this request") as e:
                        await job.output()
                    assert "\n" not in str(e.value)
                setattr(place, "on_forward" if where == "forward" else where, whole)
                out = await service.submit(PROMPT, params).output()
                assert out.token_ids == reference.decode(target, PROMPT, params)
                await settled(service)
                assert service.snapshot().kv_used == 0
                for kept in llm.engine.scheduler.kept:
                    assert kept.cache.tokens == kept.tokens  # type: ignore[attr-defined]

        run(body)

    def test_what_can_never_run_is_refused_at_once(self) -> None:
        _, llm = speculative(kv_rows=30)

        async def body() -> None:
            async with serving(llm) as service:
                with pytest.raises(InputError, match="kv_rows"):
                    service.submit(LONG, SamplingParams(max_tokens=60))
                with pytest.raises(InputError, match="empty"):
                    service.submit([], SamplingParams())
                with pytest.raises(InputError, match="no drafter 'suffx'"):
                    service.submit(PROMPT, SamplingParams(), Speculation(drafter="suffx"))
                with pytest.raises(InputError, match="not allowed"):
                    service.submit(PROMPT, SamplingParams(), Speculation(promise="lossy"))
                assert not service.worker.queued
                assert not service.alive

        run(body)


class TestControl:
    def many(self) -> tuple[TableModel, LLM]:
        target, context = pair()
        spec = "choice:of=draft-model(tokens=4)+prompt-lookup(min_ngram=1)+draft-model(tokens=2)"
        return target, LLM(target, draft=spec, context=context, max_batch=8)

    def test_each_request_has_its_own_way_and_all_say_the_same(self) -> None:
        target, llm = self.many()
        params = SamplingParams(max_tokens=25)
        want = reference.decode(target, PROMPT, params)
        wishes = [
            (Speculation(), "draft-model", 4),
            (Speculation(drafter="draft-model-2"), "draft-model-2", 2),
            (Speculation(drafter="prompt-lookup"), "prompt-lookup", 99),
            (Speculation(max_draft=1), "draft-model", 1),
            (Speculation(drafter="off"), "off", 0),
            (Speculation(max_draft=0), "off", 0),
            (Speculation(drafter="prompt-lookup", max_draft=2), "prompt-lookup", 2),
        ]

        async def body() -> None:
            async with serving(llm) as service:
                assert service.offers == ["draft-model", "prompt-lookup", "draft-model-2", "off"]
                jobs = [service.submit(PROMPT, params, control) for control, *_ in wishes]
                for job, (_, name, most) in zip(jobs, wishes, strict=True):
                    out = await job.output()
                    assert out.token_ids == want
                    told = job.speculation(0)
                    assert told["drafter"] == out.drafter == name
                    stats = out.stats
                    assert stats.drafted <= most * stats.drafts
                    assert len(told["accepted_per_position"]) <= most
                    assert (stats.drafted == 0) == (most == 0)
                    wanted = "the request asked for no drafts" if most == 0 else None
                    assert told["why_off"] == wanted
                assert service.snapshot().why_off["asked"] > 0

        run(body)

    def test_the_promise_picks_the_rule(self) -> None:
        target, context = pair()
        llm = LLM(target, draft="draft-model", verify="rejection", context=context)
        lossy = LLM(
            target, draft="draft-model", verify="typical", allow_lossy=True, context=context
        )
        sampled = SamplingParams(max_tokens=12, temperature=1.0, seed=5)
        greedy = SamplingParams(max_tokens=12)
        want = reference.decode(target, PROMPT, sampled)
        cases = [
            (llm, sampled, None, "rejection", "lossless"),
            (llm, sampled, "lossless", "rejection", "lossless"),
            (llm, sampled, "exact", "replay", "exact"),
            (llm, greedy, "exact", "greedy", "exact"),
            (lossy, sampled, None, "typical", "lossy"),
            (lossy, sampled, "lossy", "typical", "lossy"),
            (lossy, sampled, "lossless", "replay", "exact"),
            (lossy, greedy, None, "typical", "lossy"),
            (lossy, greedy, "exact", "greedy", "exact"),
        ]
        for engine, params, promise, rule, got in cases:
            out = engine.generate([PROMPT], params, speculation=Speculation(promise=promise))[0]
            assert (out.verifier, out.promise) == (rule, got), (promise, rule)
            if got == "exact":
                expected = want if params is sampled else reference.decode(target, PROMPT, greedy)
                assert out.token_ids == expected

    @pytest.mark.parametrize(
        "wish", [{"max_draft": -1}, {"max_draft": True}, {"promise": "good"}, {"drafter": 3}]
    )
    def test_wishes_that_make_no_sense(self, wish: dict) -> None:
        with pytest.raises(InputError):
            Speculation(**wish)


class TestGrowingPrompts:
    def test_rows_are_computed_while_it_grows_and_only_once(self) -> None:
        target, llm = speculative()
        params = SamplingParams(max_tokens=10)
        final = [*LONG, 5, 5, 2]

        async def body() -> None:
            async with serving(llm) as service:
                stream = service.open(params)
                for i in range(0, 12, 4):
                    stream.append(LONG[i : i + 4])
                    await self.ready(service, stream)
                    assert stream.rows == i + 3
                assert target.logit_rows == 0, "nothing is decoded before the end"
                assert target.rows_fed == 11
                stream.append(LONG[12:])
                stream.append([5, 5, 2])
                await self.ready(service, stream)
                fed = target.rows_fed
                assert fed == len(final) - 1
                job = stream.finish()
                out = await job.output()
                assert out.token_ids == reference.decode(target, final, params)
                assert out.stats.reused == len(final) - 1
                assert service.snapshot().kv_used == 0
                with pytest.raises(InputError, match="finished"):
                    stream.append([1])

        run(body)

    def test_corrections_compute_what_changed(self) -> None:
        target, llm = speculative()
        params = SamplingParams(max_tokens=6)

        async def body() -> None:
            async with serving(llm) as service:
                stream = service.open(params, prompt=LONG)
                await self.ready(service, stream)
                assert target.rows_fed == 15
                changed = [*LONG[:10], 9, 9, 9, 9]
                stream.update(changed)
                await self.ready(service, stream)
                assert target.rows_fed == 15 + 3
                assert stream.dropped == 5
                stream.update(changed[:6])  # shorter: nothing to compute
                await self.ready(service, stream)
                assert target.rows_fed == 18
                assert stream.rows == 5
                out = await stream.finish().output()
                assert out.token_ids == reference.decode(target, changed[:6], params)

        run(body)

    @pytest.mark.parametrize("seed", range(4))
    def test_any_sequence_of_changes_equals_one_shot(self, seed: int) -> None:
        import random

        r = random.Random(seed)
        target, llm = speculative(kv_rows=70, max_batch=3, step_rows=5)
        params = SamplingParams(max_tokens=8, temperature=seed % 2, seed=7, n=1 + seed % 2)
        finals = []

        async def client(service: Service) -> None:
            stream = service.open(params)
            tokens: list[int] = []
            for _ in range(r.randint(1, 6)):
                if r.random() < 0.6 or not tokens:
                    more = [r.randrange(11) for _ in range(r.randint(1, 6))]
                    stream.append(more)
                    tokens = tokens + more
                else:
                    tokens = [*tokens[: r.randint(0, len(tokens))], r.randrange(11)]
                    stream.update(tokens)
                if r.random() < 0.5:
                    await asyncio.sleep(r.random() * 0.01)
            if r.random() < 0.2:
                stream.cancel()
                return
            out = await stream.finish().output()
            finals.append((tokens, [s.token_ids for s in out.samples]))

        async def body() -> None:
            async with serving(llm) as service:
                alone = [service.submit(LONG, SamplingParams(max_tokens=40)) for _ in range(2)]
                await asyncio.gather(*(client(service) for _ in range(12)))
                for job in alone:
                    await job.output()
                await settled(service)
                assert service.snapshot().kv_used == 0

        run(body)
        assert finals
        for tokens, got in finals:
            assert got == [s.token_ids for s in LLM(target).generate([tokens], params)[0].samples]

    def test_open_streams_give_way_and_never_stop_anybody(self) -> None:
        target, llm = speculative(kv_rows=40, max_batch=2)
        params = SamplingParams(max_tokens=12)

        async def body() -> None:
            async with serving(llm) as service:
                streams = [service.open(params, prompt=[i, *LONG]) for i in range(3)]
                await asyncio.sleep(0.05)
                jobs = [service.submit([7, *PROMPT], params) for _ in range(3)]
                for job in jobs:
                    out = await job.output()
                    assert out.token_ids == reference.decode(target, [7, *PROMPT], params)
                for i, stream in enumerate(streams):
                    out = await stream.finish().output()
                    assert out.token_ids == reference.decode(target, [i, *LONG], params)
                assert service.snapshot().preemptions_total > 0

        run(body)

    def test_idle_streams_end_and_open_ones_count_against_the_queue(self) -> None:
        _, llm = speculative(max_batch=1)

        async def body() -> None:
            async with serving(llm, Limits(max_queue=1, stream_idle=0.05)) as service:
                a, b = service.open(SamplingParams()), service.open(SamplingParams())
                with pytest.raises(QueueFull):
                    service.open(SamplingParams())
                a.append(LONG)
                await asyncio.sleep(0.2)
                assert (a.closed, b.closed) == ("expired", "expired")
                with pytest.raises(InputError, match="expired"):
                    a.finish()
                snap = service.snapshot()
                assert snap.streams == 0
                assert snap.kv_used == 0
                assert snap.kv_kept == 15, "what was read may serve a later prompt"

        run(body)

    def test_text_is_encoded_as_a_whole(self) -> None:
        pieces = ["a", "b", "c", "ab", "bc", " ", "abc", "d", "e", "f", "g"]
        target = TableModel()
        llm = LLM(target, Letters(pieces))  # type: ignore[arg-type]
        params = SamplingParams(max_tokens=4)

        async def body() -> None:
            async with serving(llm) as service:
                stream = service.open(params, prompt="d")
                for piece in ("a", "b", "c", " e"):
                    stream.append(piece)
                    await self.ready(service, stream)
                assert stream.tokens == [7, 6, 5, 8]
                with pytest.raises(InputError, match="not of both"):
                    stream.append([1])
                out = await stream.finish().output()
                assert out.prompt_ids == [7, 6, 5, 8]
                assert out.token_ids == reference.decode(target, [7, 6, 5, 8], params)

        run(body)

    def test_what_is_too_long_is_refused_and_the_stream_stays(self) -> None:
        _, llm = speculative(kv_rows=30)

        async def body() -> None:
            async with serving(llm) as service:
                stream = service.open(SamplingParams(max_tokens=10), prompt=LONG)
                with pytest.raises(InputError, match="shorten"):
                    stream.append(LONG)
                assert stream.tokens == LONG
                assert len((await stream.finish().output()).token_ids) == 10
                with pytest.raises(InputError, match="outside"):
                    service.open(SamplingParams(), prompt=[999])
                with pytest.raises(InputError, match="drafter"):
                    service.open(SamplingParams(), Speculation(drafter="x"))
                assert service.snapshot().streams == 0

        run(body)

    async def ready(self, service: Service, stream: Any) -> None:
        for _ in range(200):
            await asyncio.sleep(0.002)
            if stream.rows == max(0, len(stream.tokens) - 1) and not service.worker.commands:
                return
        raise AssertionError(f"{stream.rows} of {len(stream.tokens)}")
