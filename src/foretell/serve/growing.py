"""A prompt that is still growing, seen from the event loop."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from foretell.core.errors import InputError
from foretell.core.params import SamplingParams

if TYPE_CHECKING:
    from foretell.serve.job import Job
    from foretell.serve.service import Service


class Stream:
    """A prompt that is still growing. It is read as it comes, all but its last id; `finish` turns
    it into a `Job`.

    A stream is made of text or of ids, as its first piece is. Text is encoded as a whole after
    every change, so that the ids are those of the final prompt. Rows are computed again from the
    first id that changed.
    """

    def __init__(
        self, service: Service, finish: Callable[[list[int], SamplingParams | None], Job]
    ) -> None:
        self.id = uuid.uuid4().hex
        self.created = time.time()
        self.closed: str | None = None  # finished, cancelled or expired
        self.text: str | None = None  # None: made of ids
        self.tokens: list[int] = []
        self.dropped = 0  # rows that corrections made worthless
        self._service, self._finish = service, finish
        self.sequence = service.llm.inputs.open_prompt()
        self._timer: asyncio.TimerHandle | None = None
        service.worker.order(service.llm.engine.scheduler.grow, self.sequence)
        self._touch()

    @property
    def rows(self) -> int:
        """Rows of the prompt that are ready; at most one less than it has ids."""
        cache = self.sequence.cache  # the engine's thread may take it away at any time
        return 0 if cache is None else cache.n

    @property
    def reused(self) -> int:
        """Of those, rows that were copied from another request."""
        return self.sequence.stats.reused

    def append(self, more: str | Sequence[int]) -> None:
        """More of the prompt. InputError when the stream is closed, mixes text and ids, or gets
        longer than the model or the cache can hold."""
        if isinstance(more, str):
            self._become((self.text or "") + more, more)
        else:
            self._become([*self.tokens, *more], more)

    def update(self, prompt: str | Sequence[int]) -> None:
        """Another prompt in place of this one; rows of the common beginning stay."""
        self._become(prompt, prompt)

    def _become(self, prompt: str | Sequence[int], piece: str | Sequence[int]) -> None:
        self._check_open()
        if isinstance(piece, str) != (self.text is not None) and self.tokens:
            raise InputError("A stream is made of text or of token ids, not of both.")
        tokens = self._service.llm.encode(prompt) if prompt else []
        self._service.check_length(tokens)
        self.text = prompt if isinstance(prompt, str) else None
        self.tokens = tokens
        self._service.worker.order(self._replace, tokens)
        self._touch()

    def _replace(self, tokens: list[int]) -> None:
        """In the engine's thread."""
        self.dropped += self._service.llm.engine.scheduler.replace(self.sequence, tokens)

    def finish(self, params: SamplingParams | None = None) -> Job:
        """The prompt is complete: generate. Raises like `submit`; the stream then stays open.
        params: instead of those it was opened with (what room there is may depend on the prompt).
        """
        self._check_open()
        job = self._finish(self.tokens, params)
        self._close("finished")
        return job

    def cancel(self) -> None:
        """Drop it; does nothing when it is closed."""
        if self.closed is None:
            self._service.worker.order(self._service.worker.abandon, self.sequence)
            self._close("cancelled")

    def _expire(self) -> None:
        self.cancel()
        self.closed = "expired"

    def _check_open(self) -> None:
        if self.closed is not None:
            raise InputError(f"The stream is {self.closed}: open another one.")

    def _close(self, why: str) -> None:
        self.closed = why
        self._service.streams.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def _touch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._service.limits.stream_idle, self._expire)
