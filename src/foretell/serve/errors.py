"""Every error in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}.

What the engine and pydantic raise becomes an `ApiError` in one place (`from_exception`), so that an
answer, an error event in a stream and a refused upload say the same thing.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from foretell.core.errors import ForetellError, InputError
from foretell.serve.terms import Draining, QueueFull, Timeout

log = logging.getLogger("foretell.serve")

_TYPES = (  # status -> OpenAI's error type; anything else is the client's fault below 500
    (401, "authentication_error"),
    (403, "permission_error"),
    (404, "not_found_error"),
    (429, "rate_limit_error"),
)


class ApiError(Exception):
    """An error as a client sees it. message: one sentence; param: the field that is wrong; code: a
    word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        if self.status >= 500:
            return "timeout_error" if self.status == 504 else "server_error"
        return dict(_TYPES).get(self.status, "invalid_request_error")

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode("ascii")

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def from_exception(error: BaseException) -> ApiError:
    """The answer to whatever was raised while a request was served. What nobody foresaw is logged
    with its traceback; the client is only told that it happened."""
    match error:
        case ApiError():
            return error
        case ValidationError() | RequestValidationError():
            return _from_pydantic(error)
        case InputError():
            return bad_request(str(error), _named(str(error)))
        case QueueFull():
            wait = max(1, math.ceil(error.retry_after))
            headers = {"Retry-After": str(wait)}
            return ApiError(429, str(error), code="queue_full", headers=headers)
        case Draining():
            return ApiError(503, str(error), code="draining", headers={"Retry-After": "5"})
        case Timeout():
            return ApiError(504, str(error), code="timeout")
        case HTTPException():
            return _from_http(error)
        case ClientDisconnect():  # nobody reads this
            return ApiError(499, "The client went away.", code="client_gone")
        case ForetellError():
            log.error("a request failed: %s", error)
            return ApiError(500, str(error), code="engine_error")
        case _:
            log.error("a request failed unexpectedly", exc_info=error)
            name = type(error).__name__
            return ApiError(500, f"The server failed unexpectedly ({name}); see its log.")


def _from_http(error: HTTPException) -> ApiError:
    """What the router says: no such path, no such method."""
    status, detail = error.status_code, str(error.detail)
    if status == 404:
        detail = "There is no such path on this server; /openapi.json lists them."
    elif status == 405:
        detail = "This path does not take that method; see the Allow header."
    elif detail == HTTPStatus(status).phrase:
        detail += "."
    return ApiError(status, detail, headers=error.headers)


def _named(sentence: str) -> str | None:
    """The parameter that a sentence like 'top_p=7 makes no sense' begins with."""
    head = sentence.split("=", 1)[0].split(":", 1)[0]
    return head if head.isidentifier() and head.islower() else None


def _from_pydantic(error: ValidationError | RequestValidationError) -> ApiError:
    """One sentence about the first field that is wrong; a field that may be several things has an
    error for each of them."""
    found = list(error.errors())
    first = found[0]
    if first["type"] == "json_invalid":
        why = str(first.get("ctx", {}).get("error", first["msg"])).removeprefix("Invalid JSON: ")
        return bad_request(f"The body is not valid JSON: {why}.", code="invalid_json")
    where = _path(first)
    field = where[: next((i for i, p in enumerate(where) if _is_kind(p)), len(where))]
    rules = []
    for one in found:
        path = _path(one)
        if path[: len(field)] == field:
            below = _spelt([p for p in path[len(field) :] if not _is_kind(p)])
            rules.append(f"{below} {_rule(one)}" if below else _rule(one))
    said = ", or ".join(dict.fromkeys(rules))
    name = _spelt(field)
    if not name:
        return bad_request(f"The body {said}.", code="invalid_body")
    return bad_request(f"'{name}' {said}.", name, "invalid_value")


def _path(error: Mapping[str, Any]) -> list[str | int]:
    """Where the error is; FastAPI's "body" and the name it gives a kind of body left out."""
    path = list(error["loc"])
    if path[:1] == ["body"]:
        path = path[2:] if path[1:2] in (["completion"], ["chat"]) else path[1:]
    return path


def _is_kind(part: str | int) -> bool:
    """Whether a part of a path names a member of a union (str, list[int], a class), not a field."""
    text = str(part)
    return text in ("str", "int", "float", "bool", "dict", "list") or (
        not isinstance(part, int) and (not text.isidentifier() or text[:1].isupper())
    )


def _spelt(path: list[str | int]) -> str:
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".")[:200]


def _rule(error: Mapping[str, Any]) -> str:
    """'Input should be a valid string' -> 'should be a valid string'."""
    if error["type"] == "missing":
        return "is missing"
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return message[:1].lower() + message[1:].rstrip(".")


def install(app: FastAPI) -> None:
    """Let every failure of `app` leave in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> Response:
        return from_exception(error).response()

    for kind in (
        ApiError,
        ForetellError,
        ValidationError,
        RequestValidationError,
        HTTPException,
        ClientDisconnect,
    ):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)
