"""Prompts that clients are still putting together."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request

from foretell.core.errors import ForetellError
from foretell.core.params import SamplingParams
from foretell.serve import schema
from foretell.serve.answers.answer import Answer
from foretell.serve.answers.chat import Chat
from foretell.serve.answers.completion import Completion
from foretell.serve.blocks import Level
from foretell.serve.errors import ApiError, bad_request
from foretell.serve.growing import Stream
from foretell.serve.prepare import Ask, Prepare
from foretell.serve.schema import Body, ChatRequest, Message
from foretell.serve.service import Service
from foretell.serve.stream_schema import Append, Finish, OpenChat, OpenText, Update

REMEMBERED = 1024  # closed streams whose end a client is still told


@dataclass(eq=False)
class Session:
    """One open stream: what the client has said so far, and the engine's side of it."""

    id: str
    body: OpenText | OpenChat
    stream: Stream
    ask: Ask
    created: float
    content: str | list[int] | list[Message]
    ids: list[int] = field(default_factory=list)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # changes happen in their order
    touched: float = field(default_factory=time.monotonic)


class Sessions:
    """All open streams of a server. Ids hold 160 random bits; nobody can list them. level: how much
    the answers tell about speculation."""

    def __init__(self, service: Service, prepare: Prepare, level: Level | None = None) -> None:
        self.service, self.prepare, self.level = service, prepare, level or Level()
        self.open: dict[str, Session] = {}
        self.ended: OrderedDict[str, str] = OrderedDict()

    async def begin(self, body: OpenText | OpenChat, request: Request) -> Session:
        """Open a stream. Raises ApiError, InputError, QueueFull or Draining."""
        self.prepare.check_model(body.model)
        schema.refuse_unsupported(body.model_copy(update={"stream_options": None}))
        if getattr(body, "echo", None):
            raise bad_request("'echo' is refused: a stream's prompt is not sent back.", "echo")
        for old in [s for s in self.open.values() if s.stream.closed]:
            self._close(old)
        ask = self._ask(body, request)
        content: Any = body.messages if isinstance(body, OpenChat) else body.prompt or ""
        ids = await self._ids(body, content)
        stream = self.service.open(ask.params, ask.control, timeout=body.timeout)
        session = Session(self._name(request), body, stream, ask, time.time(), content)
        self.open[session.id] = session
        try:
            self._become(session, content, ids)
        except ForetellError:
            self.cancel(session)
            raise
        return session

    def find(self, name: str) -> Session:
        """The open stream of that id; ApiError 404 says what became of it."""
        session = self.open.get(name)
        if session is not None and session.stream.closed:  # expired
            self._close(session)
            session = None
        if session is None:
            end = self.ended.get(name)
            if end is None:
                raise ApiError(404, "There is no such stream.", code="stream_not_found")
            raise ApiError(404, f"The stream is {end}: open another one.", code=f"stream_{end}")
        return session

    async def append(self, session: Session, body: Append) -> None:
        """Continue the prompt."""
        _exactly_one(body, "text", "token_ids", "messages")
        async with self._turn(session):
            content: Any = session.content
            if isinstance(session.body, OpenChat):
                content = _said(content, body)
            elif body.messages is not None:
                raise bad_request("This stream is a completion: append text.", "messages")
            elif body.text is not None:
                if isinstance(content, list) and content:
                    raise _mixed("token_ids")
                content = f"{content or ''}{body.text}"
            else:
                if isinstance(content, str) and content:
                    raise _mixed("text")
                content = [*content, *(body.token_ids or ())]
            await self._change(session, content)

    async def update(self, session: Session, body: Update) -> None:
        """Another prompt; what both begin with is not read again."""
        _exactly_one(body, "prompt", "messages")
        async with self._turn(session):
            chat = isinstance(session.body, OpenChat)
            if chat != (body.messages is not None):
                field = "messages" if chat else "prompt"
                raise bad_request(f"This stream is made of '{field}': send that.", field)
            content: Any = body.messages if chat else body.prompt
            await self._change(session, content)

    async def finish(self, session: Session, body: Finish) -> Answer:
        """The request that came of it, running; if it is not taken the stream stays open."""
        if body.stream_options is not None and not body.stream:
            raise bad_request("'stream_options' needs 'stream': true.", "stream_options")
        async with self._turn(session):
            ids = await self._ids(session.body, session.content, last=True)
            if not ids:
                raise bad_request("The prompt is empty: append something first.", "prompt")
            params = self._sampling(session.body, ids)
            session.stream.update(ids)
            job = session.stream.finish(params)
            self._close(session)
            text = session.content if isinstance(session.content, str) else None
            ask = replace(session.ask, prompts=[ids], texts=[text], params=params)
            form = {"stream": body.stream, "stream_options": body.stream_options}
            asked = session.body.model_copy(update=form)
            make: Any = Chat if isinstance(asked, ChatRequest) else Completion
            tokenizer, model = self.service.llm.tokenizer, self.prepare.names[0]
            return make(asked, ask, [job], tokenizer, model, self.level)

    def cancel(self, session: Session) -> None:
        session.stream.cancel()
        self._close(session)

    def state(self, session: Session) -> dict[str, Any]:
        """What GET answers. rows_ready: ids already read; reused: of these, taken over from another
        request; recomputed: rows that corrections cost so far."""
        stream = session.stream
        left = self.service.limits.stream_idle - (time.monotonic() - session.touched)
        return {
            "id": session.id,
            "object": "stream",
            "created": int(session.created),
            "model": self.prepare.names[0],
            "kind": "chat.completion" if isinstance(session.body, OpenChat) else "text_completion",
            "prompt_tokens": len(session.ids),
            "rows_ready": stream.rows,
            "reused": stream.reused,
            "recomputed": stream.dropped,
            "expires_in": round(max(0.0, left), 3),
        }

    # Inside

    @asynccontextmanager
    async def _turn(self, session: Session) -> AsyncIterator[None]:
        """One change at a time; whoever waited finds out if the stream ended meanwhile."""
        async with session.turn:
            self.find(session.id)
            yield

    async def _change(self, session: Session, content: Any) -> None:
        """All or nothing: a change that is refused leaves the stream as it was."""
        self._become(session, content, await self._ids(session.body, content))

    def _become(self, session: Session, content: Any, ids: list[int]) -> None:
        session.stream.update(ids)
        session.content, session.ids = content, ids
        session.touched = time.monotonic()

    def _close(self, session: Session) -> None:
        """Forget a stream that has ended, but for why."""
        if self.open.pop(session.id, None) is None:
            return
        self.ended[session.id] = session.stream.closed or "cancelled"
        while len(self.ended) > REMEMBERED:
            self.ended.popitem(last=False)

    def _name(self, request: Request) -> str:
        owner = request.scope.get("foretell.replica")  # brings later requests back to this replica
        return f"strm-{f'{owner}-' if owner else ''}{secrets.token_hex(20)}"

    def _ask(self, body: OpenText | OpenChat, request: Request) -> Ask:
        """Everything but the prompt."""
        prepare = self.prepare
        control = prepare.control(body, request.headers)
        params = self._sampling(body, [0])
        tools = isinstance(body, OpenChat) and prepare.parses(body)
        return Ask([], [], params, control, timeout=body.timeout, tools=tools)

    def _sampling(self, body: OpenText | OpenChat, ids: list[int]) -> SamplingParams:
        """The parameters that a prompt of these ids gets."""
        if isinstance(body, OpenChat):
            return self.prepare.chat_params(body, ids)
        if body.max_tokens is not None and body.max_tokens < 1:
            raise bad_request("'max_tokens' is at least 1.", "max_tokens")
        return self.prepare.completion_params(body, [ids])

    async def _ids(self, body: OpenText | OpenChat, content: Any, last: bool = False) -> list[int]:
        """The ids of what was said so far; last: with what makes the model answer (chat)."""
        if isinstance(body, OpenChat):
            return await self.prepare.conversation(body, content, last)
        if not content:
            return []
        return await self.prepare.encode(content, body.add_special_tokens is not False)


def _exactly_one(body: Body, *names: str) -> None:
    given = [n for n in names if getattr(body, n) is not None]
    if len(given) != 1:
        wanted = ", ".join(f"'{n}'" for n in names)
        raise bad_request(f"Send exactly one of {wanted}.", given[0] if given else names[0])


def _mixed(made_of: str) -> ApiError:
    return bad_request(f"This stream is made of '{made_of}': send that.", made_of)


def _said(messages: list[Message], body: Append) -> list[Message]:
    """A conversation that goes on: with further messages, or with the last one's text."""
    if body.messages is not None:
        return [*messages, *body.messages]
    if body.text is None:
        raise bad_request("This stream is a chat: append text or messages.", "token_ids")
    last = messages[-1]
    if isinstance(last.content, list):
        part = schema.TextPart(type="text", text=body.text)
        return [*messages[:-1], last.model_copy(update={"content": [*last.content, part]})]
    more = f"{last.content or ''}{body.text}"
    return [*messages[:-1], last.model_copy(update={"content": more})]
