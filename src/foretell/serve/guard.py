"""What stands before the application: API keys and the size of bodies.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foretell.serve.errors import ApiError

OPEN = ("/", "/health", "/metrics", "/ping")  # paths that need no key; the page needs its files
OPEN_BELOW = "/page/"
SWALLOWED = (
    8  # times the limit that a too large body may still be read, so that the refusal is seen
)


class ApiKeys:
    """Which keys are known. Takes the same time whatever the key and wherever it differs."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(k.encode()) for k in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def known(self, key: bytes) -> bool:
        given, found = _digest(key), False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    """Refuses requests without a key (401) and bodies of more than `max_body` bytes (413)."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_body: int) -> None:
        self.app, self.keys, self.max_body = app, keys, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["path"], headers)
        if refusal is None and self._announced(headers) > self.max_body:
            refusal = self._too_large()
            await self._swallow(receive)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self.max_body:
                    if message.get("more_body"):
                        await self._swallow(receive)
                    raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if not self.keys or path in OPEN or path.startswith(OPEN_BELOW):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.keys.known(key.strip().encode("latin-1")):
            return None
        what = "This API key is not known here." if key else "An API key is needed"
        more = "" if key else ": send 'Authorization: Bearer KEY'."
        challenge = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, what + more, code="invalid_api_key", headers=challenge)

    def _announced(self, headers: Headers) -> int:
        text = headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than this server takes ({self.max_body} bytes): send less.",
            code="body_too_large",
        )

    async def _swallow(self, receive: Receive) -> None:
        """Read on for a while: a client that is still sending does not see an early answer."""
        size = 0
        while size < SWALLOWED * self.max_body:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return
