"""One request on its way through the server, seen from the event loop."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from foretell.core.errors import ForetellError
from foretell.core.params import Speculation
from foretell.engine.metrics import Stats
from foretell.engine.outputs import RequestOutput
from foretell.engine.request import Request
from foretell.engine.sequence import TokenEvent, TopLogprobs
from foretell.serve.terms import JobSummary

if TYPE_CHECKING:
    from foretell.serve.worker import Worker


class Job:
    """One request with its n samples. Belongs to the event loop; `left` and `started` are written
    by the engine's thread."""

    def __init__(self, worker: Worker, request: Request) -> None:
        self.id = uuid.uuid4().hex
        self.created = time.time()
        self.arrived = time.perf_counter()
        self.started: float | None = None  # when it got a place
        self.reason: str | None = None  # why the request ended
        self.left = len(request.sequences)  # samples still running
        self._worker, self.request = worker, request
        self._inbox: deque[list[TokenEvent]] = deque()
        self._error: ForetellError | None = None
        self._news = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def prompt_ids(self) -> list[int]:
        return self.request.prompt

    @property
    def control(self) -> Speculation:
        return self.request.control

    @property
    def prompt_logprobs(self) -> list[TopLogprobs | None]:
        """Of the prompt's ids, where they were asked for; whole from the first event on."""
        return self.request.sequences[0].prompt_logprobs

    def stats(self, sample: int = 0) -> Stats:
        """The counters of a sample, so far."""
        return self.request.sequences[sample].stats

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        """The events of a step at a time, one for each token; ends after the last sample's last
        event, or when the request is cancelled. Raises what ended the request otherwise. Closing
        the iterator early cancels the request."""
        try:
            while True:
                while self._inbox:
                    yield self._inbox.popleft()
                if self.done:
                    break
                self._news.clear()
                await self._news.wait()
            if self._error is not None:
                raise self._error
        finally:
            self.cancel()

    async def output(self) -> RequestOutput:
        """Wait for the end; a cancelled request has the tokens it came to. If the waiting task is
        cancelled so is the request."""
        try:
            await self._ended.wait()
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error
        return self.request.output()

    def deliver(self, events: list[TokenEvent]) -> None:
        """The service's: what a step emitted for it."""
        self._inbox.append(events)
        self._news.set()

    def close(self, reason: str, error: ForetellError | None) -> None:
        """The service's: nothing more will come."""
        self.reason, self._error = reason, error
        self._ended.set()
        self._news.set()

    def cancel(self) -> None:
        """Drop the request within one step. Does nothing when it has ended."""
        if not self.done:
            self._worker.order(self._worker.drop, self, "cancelled", None)

    def speculation(self, sample: int = 0) -> dict[str, Any]:
        """What speculation did for a sample so far: drafter, verifier, promise, steps, drafts
        (steps with one), drafted, accepted, acceptance_length, accepted_per_position, and why_off:
        why nothing was drafted, or None."""
        return self.request.speculation(sample)

    def summary(self) -> JobSummary:
        """The ended request in numbers."""
        stats = [s.stats for s in self.request.sequences]
        now = time.perf_counter()
        generated = sum(s.emitted for s in stats)
        firsts = [s.first for s in stats if s.first]
        first, later = min(firsts, default=None), generated - len(firsts)
        spent = sum((s.end or now) - s.first for s in stats if s.first)
        return JobSummary(
            self.id,
            self.reason or "error",
            len(self.prompt_ids),
            generated,
            (self.started or now) - self.arrived,
            None if first is None else first - self.arrived,
            spent / later if later > 0 else None,
            now - self.arrived,
        )
