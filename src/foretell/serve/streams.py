"""`/v1/streams`: a prompt that is sent while it is still being put together.

    POST   /v1/streams               open; the fields of a completion or chat completion
    POST   /v1/streams/{id}/append   {"text" | "token_ids" | "messages"}
    PUT    /v1/streams/{id}          {"prompt" | "messages"}: another prompt in place of this one
    POST   /v1/streams/{id}/finish   {"stream", "stream_options"}: the answer, as if sent at once
    GET    /v1/streams/{id}          where it stands
    DELETE /v1/streams/{id}          cancel

The engine reads what is there while the rest is being fetched (Stream2LLM's append and update
mode): after `finish` only the last rows are missing. The whole text is encoded again after every
change, so that the ids are always those of the final prompt; rows of the longest common beginning
stay. The answer is therefore that of the same prompt sent at once, token for token.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from pydantic_core import from_json

from foretell.serve.blocks import Level
from foretell.serve.describe import DEFAULT, REF
from foretell.serve.prepare import Prepare
from foretell.serve.respond import read, respond
from foretell.serve.service import Service
from foretell.serve.sessions import Sessions
from foretell.serve.stream_schema import Append, Finish, OpenChat, OpenText, Update

NOTHING_MORE = Finish.model_validate({})


def _talks(body: bytes) -> bool:
    """Whether a body opens a chat. One that cannot be read is refused by whoever validates it."""
    try:
        parsed = from_json(body)
    except ValueError:
        return False
    return isinstance(parsed, dict) and parsed.get("messages") is not None


def _takes(*bodies: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of an endpoint that reads one of these; what they are made of is defined in
    the document already."""
    schemas = [b.model_json_schema(ref_template=REF) for b in bodies]
    for one in schemas:
        one.pop("$defs", None)
    one = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    needed = bodies[0] is not Finish
    return {"requestBody": {"required": needed, "content": {"application/json": {"schema": one}}}}


def router(service: Service, prepare: Prepare, level: Level | None = None) -> APIRouter:
    """The routes of a service."""
    sessions = Sessions(service, prepare, level)
    routes = APIRouter(prefix="/v1/streams", tags=["streams"], responses=DEFAULT)

    @routes.post("", openapi_extra=_takes(OpenText, OpenChat))
    async def begin(request: Request) -> dict[str, Any]:
        """Open a stream: the fields of a completion, or of a chat completion (messages)."""
        kind = OpenChat if _talks(await request.body()) else OpenText
        body = await read(request, kind)
        return sessions.state(await sessions.begin(body, request))

    @routes.get("/{name}")
    async def state(name: str) -> dict[str, Any]:
        """Where a stream stands."""
        return sessions.state(sessions.find(name))

    @routes.post("/{name}/append", openapi_extra=_takes(Append))
    async def append(name: str, request: Request) -> dict[str, Any]:
        """Continue the prompt."""
        session = sessions.find(name)
        await sessions.append(session, await read(request, Append))
        return sessions.state(session)

    @routes.put("/{name}", openapi_extra=_takes(Update))
    async def update(name: str, request: Request) -> dict[str, Any]:
        """Put another prompt in place of this one."""
        session = sessions.find(name)
        await sessions.update(session, await read(request, Update))
        return sessions.state(session)

    @routes.post("/{name}/finish", openapi_extra=_takes(Finish))
    async def finish(name: str, request: Request) -> Response:
        """The prompt is complete: answer it. The body may be left out."""
        session = sessions.find(name)
        body = await read(request, Finish) if await request.body() else NOTHING_MORE
        answer = await sessions.finish(session, body)
        return await respond(request, answer)

    @routes.delete("/{name}")
    async def cancel(name: str) -> dict[str, Any]:
        """Drop a stream."""
        session = sessions.find(name)
        sessions.cancel(session)
        return {"id": session.id, "object": "stream", "deleted": True}

    return routes
