"""The engine behind a thread (`worker.py`), seen from asyncio."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from foretell.core.errors import ForetellError, InputError
from foretell.core.params import NO_WISH, SamplingParams, Speculation
from foretell.core.protocols import Constraint
from foretell.engine.llm import LLM
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
)
from foretell.serve.worker import Worker

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
        self.alive: set[Job] = set()
        self.streams: set[Stream] = set()  # open ones
        self.pace = Pace()
        self.worker = Worker(llm, self.pace, self._deliver, self._end)
        self._draining = False
        self._reasons: dict[str, int] = dict.fromkeys(REASONS, 0)

    @property
    def offers(self) -> list[str]:
        """Names of the drafters a request may choose, the default first, "off" last."""
        return [*self.llm.rules.offers, "off"]

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
        loop = asyncio.get_running_loop()
        cost = getattr(self.llm.policy, "cost", None)
        if cost is not None:
            await loop.run_in_executor(None, cost.seconds, 1)
        self.worker.start(loop)

    async def stop(self) -> None:
        """At once: what runs, waits or grows is dropped; its clients get `Draining`."""
        self._draining = True
        if not self.worker.alive:
            return
        for stream in list(self.streams):
            stream.cancel()
        gone = Draining("The server has stopped: send the request again.")
        for job in list(self.alive):
            self.worker.order(self.worker.drop, job, "error", gone)
        await self.worker.stop()
        for job in list(self.alive):  # whatever the thread could not say any more
            self._end(job, "error", gone)

    async def drain(self, grace: float) -> None:
        """Refuse new requests, finish those that are here (at most `grace` seconds), then stop."""
        self._draining = True
        end = time.monotonic() + grace
        while self.alive and time.monotonic() < end:
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
        self.llm.inputs.request([0], params, constraint, control)  # what is wrong is said at once

        def finish(tokens: list[int], better: SamplingParams | None) -> Job:
            if self._draining:
                raise Draining("The server is stopping and takes no new requests.")
            return self._submit(tokens, better or params, control, timeout, constraint, stream)

        stream = Stream(self, finish)
        self.streams.add(stream)
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
            waiting=max(len(scheduler.waiting), len(self.worker.queued)),
            streams=len(self.streams),
            kv_rows=scheduler.rows,
            kv_used=self.worker.rows[0],
            kv_kept=self.worker.rows[1],
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
            tokens_per_second=self.pace.tokens_per_second(),
            draining=self._draining,
        )

    def _check_room(self) -> None:
        if self._draining or not self.worker.alive:
            raise Draining("The server is stopping and takes no new requests.")
        scheduler = self.llm.engine.scheduler
        places = max(0, scheduler.max_batch - len(scheduler.running))
        waiting = len(self.worker.queued) + len(self.streams)
        if waiting >= self.limits.max_queue + places:
            wait = self.pace.wait_for(waiting)
            raise QueueFull(
                f"{waiting} requests wait already: try again in {wait:.0f} seconds.", wait
            )

    def check_length(self, tokens: Sequence[int]) -> None:
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
        request = self.llm.inputs.request(prompt, params, constraint, control)
        self.llm.engine.scheduler.check(request.sequences[0])
        job = Job(self.worker, request)
        given = [t for t in (timeout, self.limits.timeout) if t is not None]
        self.alive.add(job)
        self.worker.queued.add(job)
        deadline = job.arrived + min(given) if given else None
        grown = None if stream is None else stream.sequence
        self.worker.order(self.worker.add, job, deadline, grown)
        return job

    # What the worker says

    def _deliver(self, batch: dict[Job, list[TokenEvent]], over: set[Job]) -> None:
        for job, events in batch.items():
            if job.done:
                continue
            job.deliver(events)
            if job in over:
                self._end(job, events[-1].finish_reason or "stop", None)

    def _end(self, job: Job, reason: str, error: ForetellError | None) -> None:
        if job.done:
            return
        self.alive.discard(job)
        self.worker.queued.discard(job)
        self._reasons[reason] += 1
        job.close(reason, error)
        if reason in ("stop", "length"):
            self.pace.finished()
        if self.on_done is not None:
            try:
                self.on_done(job.summary())
            except Exception:  # statistics never cost a client its answer
                log.exception("on_done failed")
