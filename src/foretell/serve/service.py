"""The engine behind a thread, seen from asyncio.

One thread runs steps while there is work and sleeps otherwise. Everything it is asked for (a new
request, a cancellation, an append to a stream) is a command that it takes between two steps; what
a step emitted goes to the event loop in one `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from foretell.core.errors import ForetellError, InputError
from foretell.core.params import NO_WISH, SamplingParams, Speculation
from foretell.core.protocols import Constraint
from foretell.engine.llm import LLM
from foretell.engine.sequence import Sequence as EngineSequence
from foretell.engine.sequence import TokenEvent
from foretell.serve.growing import Stream
from foretell.serve.job import Job
from foretell.serve.pace import Pace
from foretell.serve.terms import (
    REASONS,
    Draining,
    JobSummary,
    Limits,
    QueueFull,
    Snapshot,
    Timeout,
    said,
)

log = logging.getLogger(__name__)


class Service:
    """Runs an `LLM` for many clients at once. Everything but `snapshot` belongs to the event loop
    that called `start`; while it runs nobody else uses the engine of the `LLM`.

    on_done: called on the event loop with the `JobSummary` of every request that ended.
    """

    def __init__(
        self,
        llm: LLM,
        limits: Limits | None = None,
        on_done: Callable[[JobSummary], None] | None = None,
    ) -> None:
        self.llm, self.limits, self.on_done = llm, limits or Limits(), on_done
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._alive: set[Job] = set()
        self._streams: set[Stream] = set()  # open ones
        self._draining = False
        self._pace = Pace()
        self._reasons: dict[str, int] = dict.fromkeys(REASONS, 0)
        # between the threads
        self._commands: deque[tuple[Callable, tuple]] = deque()
        self._wake = threading.Event()
        self._queued: set[Job] = set()  # not admitted yet
        # the engine thread's
        self._jobs: dict[int, Job] = {}  # by request id
        self._deadlines: list[tuple[float, int]] = []  # a heap of (when, request id)
        self._stopping = False
        self._rows = (0, 0)  # used by live sequences, kept

    @property
    def offers(self) -> list[str]:
        """Names of the drafters a request may choose, the default first, "off" last."""
        return [*self.llm.offers, "off"]

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer that the model and the cache hold."""
        return min(self.llm.model.spec.max_positions, self.llm.engine.scheduler.rows)

    @property
    def draining(self) -> bool:
        return self._draining

    async def start(self) -> None:
        """Comes back when the engine is ready; a policy that minds costs may measure them first,
        for some seconds."""
        self._loop = asyncio.get_running_loop()
        cost = getattr(self.llm.policy, "cost", None)
        if cost is not None:
            await self._loop.run_in_executor(None, cost.seconds, 1)
        self.llm.engine.isolate = True
        self._watch_admission()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """At once: what runs, waits or grows is dropped; its clients get `Draining`."""
        self._draining = True
        thread, self._thread = self._thread, None
        if thread is None or self._loop is None:
            return
        for stream in list(self._streams):
            stream.cancel()
        gone = Draining("The server has stopped: send the request again.")
        for job in list(self._alive):
            self._order(self._drop, job, "error", gone)
        self._order(self._stop)
        await self._loop.run_in_executor(None, thread.join)
        self.llm.engine.isolate = False
        self.llm.engine.scheduler.on_admit = self.llm.engine._begin
        for job in list(self._alive):  # whatever the thread could not say any more
            self._end(job, "error", gone)

    async def drain(self, grace: float) -> None:
        """Refuse new requests, finish those that are here (at most `grace` seconds), then stop."""
        self._draining = True
        end = time.monotonic() + grace
        while self._alive and time.monotonic() < end:
            await asyncio.sleep(0.02)
        await self.stop()

    def submit(
        self,
        prompt: Sequence[int] | str,
        params: SamplingParams,
        control: Speculation = NO_WISH,
        *,
        timeout: float | None = None,
        constraint: Callable[[], Constraint] | None = None,
    ) -> Job:
        """Queue a request. Raises InputError, QueueFull or Draining. timeout: seconds it may take
        in all; never more than the limits say."""
        self._check_room()
        return self._submit(prompt, params, control, timeout, constraint, None)

    def open(
        self,
        params: SamplingParams,
        control: Speculation = NO_WISH,
        *,
        prompt: str | Sequence[int] = "",
        timeout: float | None = None,
        constraint: Callable[[], Constraint] | None = None,
    ) -> Stream:
        """Begin a request whose prompt is still growing. Raises like `submit`. timeout: seconds it
        may take once it is finished."""
        self._check_room()
        self.llm.request([0], params, constraint, control)  # what is wrong is said at once

        def finish(tokens: list[int], better: SamplingParams | None) -> Job:
            if self._draining:
                raise Draining("The server is stopping and takes no new requests.")
            return self._submit(tokens, better or params, control, timeout, constraint, stream)

        stream = Stream(self, finish)
        self._streams.add(stream)
        if prompt:
            try:
                stream.append(prompt)
            except ForetellError:
                stream.cancel()
                raise
        return stream

    def snapshot(self) -> Snapshot:
        """Where the server stands; cheap, from any thread."""
        engine = self.llm.engine
        scheduler, t = engine.scheduler, engine.totals
        return Snapshot(
            running=len(scheduler.running),
            waiting=max(len(scheduler.waiting), len(self._queued)),
            streams=len(self._streams),
            kv_rows=scheduler.rows,
            kv_used=self._rows[0],
            kv_kept=self._rows[1],
            prompt_tokens_total=t.prompt,
            generated_tokens_total=t.generated,
            requests_total=dict(self._reasons),
            preemptions_total=scheduler.preempted,
            prefix_hit_tokens_total=scheduler.copied,
            num_drafts_total=t.drafts,
            draft_tokens_total=t.drafted,
            accepted_tokens_total=t.accepted,
            accepted_per_pos=list(t.per_position),
            draft_lengths={n: count for n, count in enumerate(list(t.lengths)) if count},
            why_off={key: count for key, count in list(t.off.items()) if count},
            steps_total=t.steps,
            draft_seconds_total=t.draft_s,
            target_seconds_total=t.target_s,
            verify_seconds_total=t.verify_s,
            tokens_per_second=self._pace.tokens_per_second(),
            draining=self._draining,
        )

    def _check_room(self) -> None:
        if self._draining or self._thread is None:
            raise Draining("The server is stopping and takes no new requests.")
        scheduler = self.llm.engine.scheduler
        places = max(0, scheduler.max_batch - len(scheduler.running))
        waiting = len(self._queued) + len(self._streams)
        if waiting >= self.limits.max_queue + places:
            wait = self._pace.wait_for(waiting)
            raise QueueFull(
                f"{waiting} requests wait already: try again in {wait:.0f} seconds.", wait
            )

    def _check_length(self, tokens: Sequence[int]) -> None:
        """InputError when no request with this prompt could ever run."""
        if len(tokens) >= self.context:
            room = self.context - 1
            raise InputError(
                f"The prompt has {len(tokens)} tokens and there is room for {room}: shorten it."
            )

    def _submit(
        self,
        prompt: Sequence[int] | str,
        params: SamplingParams,
        control: Speculation,
        timeout: float | None,
        constraint: Callable[[], Constraint] | None,
        stream: Stream | None,
    ) -> Job:
        request = self.llm.request(prompt, params, constraint, control)
        self.llm.engine.scheduler.check(request.sequences[0])
        job = Job(self, request)
        given = [t for t in (timeout, self.limits.timeout) if t is not None]
        self._alive.add(job)
        self._queued.add(job)
        self._order(self._add, job, job.arrived + min(given) if given else None, stream)
        return job

    def _order(self, what: Callable, *args: Any) -> None:
        """Have something done by the engine's thread, between two steps."""
        self._commands.append((what, args))
        self._wake.set()

    # The engine's thread.

    def _work(self) -> None:
        engine, stuck = self.llm.engine, False
        scheduler = engine.scheduler
        while True:
            while self._commands:
                self._take(*self._commands.popleft())
                stuck = False
            if self._stopping:
                return
            self._expire()
            grows = not stuck and any(s.pending > 1 for s in scheduler.growing)
            if scheduler.idle and not grows:
                self._gauge()
                self._wake.wait(self._until_deadline())
                self._wake.clear()
                continue
            try:
                events = engine.step()
            except Exception as error:
                self._fail_step(error)
                continue
            stuck = not engine.moved
            if stuck and not scheduler.idle:
                self._fail_step(
                    ForetellError("The scheduler found nothing to run; please report this.")
                )
            self._gauge()
            self._dispatch(events)

    def _take(self, what: Callable, args: tuple) -> None:
        try:
            what(*args)
        except Exception as error:
            log.exception("%s failed", what.__name__)
            if args and isinstance(args[0], Job):
                self._drop(args[0], "error", said(error))

    def _watch_admission(self) -> None:
        scheduler, begin = self.llm.engine.scheduler, self.llm.engine._begin

        def admitted(seq: EngineSequence) -> None:
            begin(seq)
            job = self._jobs.get(seq.request)
            if job is not None and job.started is None:
                job.started = time.perf_counter()
                self._queued.discard(job)

        scheduler.on_admit = admitted

    def _add(self, job: Job, deadline: float | None, stream: Stream | None) -> None:
        self._jobs[job._request.id] = job
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, job._request.id))
        scheduler = self.llm.engine.scheduler
        first = job._request.sequences[0]
        if stream is not None:
            cache = scheduler.release(stream._seq)
            if cache is not None and cache.n and first.params.prompt_logprobs is None:
                first.cache, first.view.cached = cache, cache.n
                first.stats.reused = cache.n
        for seq in job._request.sequences:
            scheduler.add(seq)

    def _abandon(self, seq: EngineSequence) -> None:
        """A stream is given up; what was read of it may serve a later prompt."""
        scheduler = self.llm.engine.scheduler
        cache = scheduler.release(seq)
        if cache is not None:
            scheduler.keep(seq.tokens, cache)

    def _stop(self) -> None:
        self._stopping = True

    def _expire(self) -> None:
        now = time.perf_counter()
        while self._deadlines and self._deadlines[0][0] <= now:
            job = self._jobs.get(heapq.heappop(self._deadlines)[1])
            if job is not None:
                spent = now - job.arrived
                late = Timeout(f"The request was not done after {spent:.1f} seconds.")
                self._drop(job, "timeout", late)

    def _until_deadline(self) -> float | None:
        if not self._deadlines:
            return None
        return max(0.0, self._deadlines[0][0] - time.perf_counter())

    def _drop(self, job: Job, reason: str, error: ForetellError | None) -> None:
        """End a job early; its rows go, or serve later prompts."""
        if self._jobs.pop(job._request.id, None) is None:
            return
        for seq in job._request.sequences:
            if seq.finish.reason is None:
                seq.finish.reason = reason
                seq.stats.end = time.perf_counter()
                self._retire(seq, keep=reason != "error")
        self._gauge()
        self._call(self._end, job, reason, error)

    def _retire(self, seq: EngineSequence, keep: bool) -> None:
        try:
            self.llm.engine.scheduler.retire(seq, keep)
        except Exception:  # a drafter that cannot even forget it
            log.exception("forgetting a sequence failed")

    def _fail_step(self, error: Exception) -> None:
        """A step failed: so do the requests that were in it; growing prompts lose their rows."""
        turns = [t.seq for t in self.llm.engine.turns] or list(self.llm.engine.scheduler.running)
        if not isinstance(error, ForetellError):
            log.error("a step failed", exc_info=error)
        for seq in turns:
            if seq.open:
                seq.cache, seq.view.cached = None, 0
                continue
            job = self._jobs.get(seq.request)
            if job is not None:
                self._drop(job, "error", said(error))
            elif seq in self.llm.engine.scheduler.running:
                self._retire(seq, keep=False)

    def _dispatch(self, events: list[TokenEvent]) -> None:
        batch: dict[Job, list[TokenEvent]] = {}
        over: set[Job] = set()  # said with the events: the next step may be done before they arrive
        for event in events:
            job = self._jobs.get(event.request)
            if job is None:
                continue
            batch.setdefault(job, []).append(event)
            if event.finish_reason is not None:
                job.left -= 1
                if not job.left:
                    over.add(job)
                    del self._jobs[event.request]
        for seq, error in self.llm.engine.failed:
            job = self._jobs.get(seq.request)
            if job is not None:
                self._drop(job, "error", said(error))
        if batch:
            self._pace.emitted(len(events))
            self._call(self._deliver, batch, over)

    def _gauge(self) -> None:
        scheduler = self.llm.engine.scheduler
        spare = scheduler.spare
        self._rows = (scheduler.used - spare, spare)

    def _call(self, what: Callable, *args: Any) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(what, *args)

    # The event loop again.

    def _deliver(self, batch: dict[Job, list[TokenEvent]], over: set[Job]) -> None:
        for job, events in batch.items():
            if job.done:
                continue
            job._inbox.append(events)
            job._news.set()
            if job in over:
                self._end(job, events[-1].finish_reason or "stop", None)

    def _end(self, job: Job, reason: str, error: ForetellError | None) -> None:
        if job.done:
            return
        self._alive.discard(job)
        self._queued.discard(job)
        self._reasons[reason] += 1
        job.reason, job._error = reason, error
        if reason in ("stop", "length"):
            self._pace.finished()
        job._ended.set()
        job._news.set()
        if self.on_done is not None:
            try:
                self.on_done(job.summary())
            except Exception:  # statistics never cost a client its answer
                log.exception("on_done failed")
