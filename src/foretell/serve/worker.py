"""The engine's thread: it runs steps while there is work and sleeps otherwise.

Everything it is asked for (a new request, a cancellation, an append to a stream) is a command that
it takes between two steps; what a step emitted goes to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from foretell.core.errors import ForetellError
from foretell.engine.llm import LLM
from foretell.engine.sequence import Sequence, TokenEvent
from foretell.serve.job import Job
from foretell.serve.pace import Pace
from foretell.serve.terms import Timeout, said

log = logging.getLogger(__name__)


class Worker:
    """Runs the engine of an `LLM`. `order` may be called from any thread; what it is given runs on
    the engine's.

    deliver(events by job, jobs that are over) and end(job, reason, error) are called on the event
    loop.
    """

    def __init__(
        self,
        llm: LLM,
        pace: Pace,
        deliver: Callable[[dict[Job, list[TokenEvent]], set[Job]], None],
        end: Callable[[Job, str, ForetellError | None], None],
    ) -> None:
        self.llm, self.pace, self.deliver, self.end = llm, pace, deliver, end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # between the threads
        self.commands: deque[tuple[Callable, tuple]] = deque()
        self.queued: set[Job] = set()  # not admitted yet
        self.rows = (0, 0)  # used by live sequences, kept
        self._wake = threading.Event()
        # the engine thread's
        self.jobs: dict[int, Job] = {}  # by request id
        self._deadlines: list[tuple[float, int]] = []  # a heap of (when, request id)
        self._stopping = False

    @property
    def alive(self) -> bool:
        return self._thread is not None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.llm.engine.isolate = True
        self._watch_admission()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Comes back when the commands given so far are done and the thread is gone."""
        thread, self._thread = self._thread, None
        if thread is None or self._loop is None:
            return
        self.order(self._stop)
        await self._loop.run_in_executor(None, thread.join)
        self.llm.engine.isolate = False
        self.llm.engine.scheduler.on_admit = self.llm.engine._begin

    def order(self, what: Callable, *args: Any) -> None:
        """Have something done by the engine's thread, between two steps."""
        self.commands.append((what, args))
        self._wake.set()

    # Commands

    def add(self, job: Job, deadline: float | None, grown: Sequence | None) -> None:
        """Begin a request. grown: the open prompt it comes from, whose rows it takes over."""
        self.jobs[job.request.id] = job
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, job.request.id))
        scheduler = self.llm.engine.scheduler
        first = job.request.sequences[0]
        if grown is not None:
            cache = scheduler.release(grown)
            if cache is not None and cache.n and first.params.prompt_logprobs is None:
                first.cache, first.view.cached = cache, cache.n
                first.stats.reused = cache.n
        for seq in job.request.sequences:
            scheduler.add(seq)

    def abandon(self, seq: Sequence) -> None:
        """A stream is given up; what was read of it may serve a later prompt."""
        scheduler = self.llm.engine.scheduler
        cache = scheduler.release(seq)
        if cache is not None:
            scheduler.keep(seq.tokens, cache)

    def drop(self, job: Job, reason: str, error: ForetellError | None) -> None:
        """End a job early; its rows go, or serve later prompts."""
        if self.jobs.pop(job.request.id, None) is None:
            return
        for seq in job.request.sequences:
            if seq.finish.reason is None:
                seq.finish.reason = reason
                seq.stats.end = time.perf_counter()
                self._retire(seq, keep=reason != "error")
        self._gauge()
        self._call(self.end, job, reason, error)

    def _stop(self) -> None:
        self._stopping = True

    # Steps

    def _work(self) -> None:
        engine, stuck = self.llm.engine, False
        scheduler = engine.scheduler
        while True:
            while self.commands:
                self._take(*self.commands.popleft())
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
                self.drop(args[0], "error", said(error))

    def _watch_admission(self) -> None:
        scheduler, begin = self.llm.engine.scheduler, self.llm.engine._begin

        def admitted(seq: Sequence) -> None:
            begin(seq)
            job = self.jobs.get(seq.request)
            if job is not None and job.started is None:
                job.started = time.perf_counter()
                self.queued.discard(job)

        scheduler.on_admit = admitted

    def _expire(self) -> None:
        now = time.perf_counter()
        while self._deadlines and self._deadlines[0][0] <= now:
            job = self.jobs.get(heapq.heappop(self._deadlines)[1])
            if job is not None:
                spent = now - job.arrived
                late = Timeout(f"The request was not done after {spent:.1f} seconds.")
                self.drop(job, "timeout", late)

    def _until_deadline(self) -> float | None:
        if not self._deadlines:
            return None
        return max(0.0, self._deadlines[0][0] - time.perf_counter())

    def _retire(self, seq: Sequence, keep: bool) -> None:
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
            job = self.jobs.get(seq.request)
            if job is not None:
                self.drop(job, "error", said(error))
            elif seq in self.llm.engine.scheduler.running:
                self._retire(seq, keep=False)

    def _dispatch(self, events: list[TokenEvent]) -> None:
        batch: dict[Job, list[TokenEvent]] = {}
        over: set[Job] = set()  # said with the events: the next step may be done before they arrive
        for event in events:
            job = self.jobs.get(event.request)
            if job is None:
                continue
            batch.setdefault(job, []).append(event)
            if event.finish_reason is not None:
                job.left -= 1
                if not job.left:
                    over.add(job)
                    del self.jobs[event.request]
        for seq, error in self.llm.engine.failed:
            job = self.jobs.get(seq.request)
            if job is not None:
                self.drop(job, "error", said(error))
        if batch:
            self.pace.emitted(len(events))
            self._call(self.deliver, batch, over)

    def _gauge(self) -> None:
        scheduler = self.llm.engine.scheduler
        spare = scheduler.spare
        self.rows = (scheduler.used - spare, spare)

    def _call(self, what: Callable, *args: Any) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(what, *args)
