"""From a request on the wire to its answer: read, submit, wait or stream, notice who leaves.

A stream's status line waits for the first token, so that whatever goes wrong before it (a timeout
in the queue, a constraint that allows nothing) still has a status of its own; later it is an error
event.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from foretell.engine.sequence import TokenEvent
from foretell.serve.answers.answer import DONE, Answer
from foretell.serve.errors import ApiError, from_exception
from foretell.serve.job import Job
from foretell.serve.prepare import Ask
from foretell.serve.service import Service

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
STUCK = 120.0  # seconds a client may refuse to take what was sent before it is given up


async def read(request: Request, kind: type[M]) -> M:
    """The body of a request. Another content type is refused: pages of other sites can send those
    without being asked first."""
    said = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said != "application/json" and not (said.startswith("application/") and "+json" in said):
        raise ApiError(
            415,
            "The body is JSON: send 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )
    return kind.model_validate_json(await request.body())


def submit(service: Service, ask: Ask) -> list[Job]:
    """One job a prompt: all of them or none."""
    jobs: list[Job] = []
    try:
        for prompt in ask.prompts:
            jobs.append(service.submit(prompt, ask.params, ask.control, timeout=ask.timeout))
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    return jobs


async def respond(request: Request, answer: Answer) -> Response:
    """The HTTP answer: an event stream or one JSON object. Its jobs are cancelled within one step
    when the client goes away."""
    if answer.body.stream:
        return EventStream(answer)
    try:
        outputs = await unless_gone(request.receive, _outputs(answer.jobs))
    finally:
        for job in answer.jobs:
            job.cancel()
    body = json.dumps(answer.whole(outputs), allow_nan=False)
    return Response(body, headers={"X-Request-Id": answer.id}, media_type="application/json")


async def _outputs(jobs: Sequence[Job]) -> list[Any]:
    return await asyncio.gather(*(job.output() for job in jobs))


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; ClientDisconnect, with `work` cancelled, when the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, one a token; the events of a step leave in one write."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.background = None
        self.started = False
        self.status_code = 200
        self.init_headers(
            {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "X-Request-Id": answer.id,
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await unless_gone(receive, self._run(scope, receive, send))
        finally:
            for job in self.answer.jobs:
                job.cancel()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._stream(send)
        except ClientDisconnect:
            raise
        except Exception as error:
            failure = from_exception(error)
            if not self.started:
                await failure.response()(scope, receive, send)
                return
            await self._write(send, f"data: {failure.body().decode()}\n\n{DONE}", last=True)

    async def _stream(self, send: Send) -> None:
        answer = self.answer
        begun = [False] * len(answer.jobs)
        async for at, events in merged(answer.jobs):
            parts: list[str] = []
            if not begun[at]:
                begun[at] = True
                parts.extend(answer.first(at))
            parts.extend(answer.chunks(at, events))
            if answer.left:
                await self._write(send, "".join(parts))
            else:
                parts.extend(answer.last())
                await self._write(send, "".join(parts), last=True)

    async def _write(self, send: Send, text: str, last: bool = False) -> None:
        if not self.started:
            self.started = True
            headers = self.raw_headers
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = text.encode("ascii")
        try:
            async with asyncio.timeout(STUCK):
                await send({"type": "http.response.body", "body": body, "more_body": not last})
        except TimeoutError:
            raise ClientDisconnect from None


async def merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
    """(index of the job, events) of all jobs, as they come."""
    if len(jobs) == 1:
        async for events in jobs[0]:
            yield 0, events
        return
    news: asyncio.Queue[tuple[int, list[TokenEvent] | BaseException | None]] = asyncio.Queue()

    async def pump(at: int, job: Job) -> None:
        try:
            async for events in job:
                news.put_nowait((at, events))
            news.put_nowait((at, None))
        except BaseException as error:
            news.put_nowait((at, error))
            if not isinstance(error, Exception):
                raise

    pumps = [asyncio.ensure_future(pump(i, job)) for i, job in enumerate(jobs)]
    left = len(jobs)
    try:
        while left:
            at, events = await news.get()
            if isinstance(events, BaseException):
                raise events
            if events is None:
                left -= 1
            else:
                yield at, events
    finally:
        for one in pumps:
            one.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
