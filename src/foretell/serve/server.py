"""uvicorn around the app: the socket, and how a server stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from foretell.core.errors import InputError
from foretell.serve.service import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEAD = (  # socket options: seconds of silence, between probes, probes; milliseconds unread
    ("TCP_KEEPIDLE", 60),
    ("TCP_KEEPINTVL", 15),
    ("TCP_KEEPCNT", 4),
    ("TCP_USER_TIMEOUT", 120_000),
)
ENDED = 128  # plus the signal: the exit code when a second one ends the process at once


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet: whether the address can be had is known
    before a model is loaded, and nobody connects before it can answer. InputError."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} is not possible: it lies in 0..65535 (0 = any free one).")
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {host} cannot be resolved ({why}): use an address here."
        ) from None
    family, kind, protocol, _, address = found[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise InputError(
            f"{host}:{port} cannot be used ({error.strerror}): choose another --port or --host."
        ) from None
    _notice_the_dead(made)
    made.setblocking(False)
    return made


def _notice_the_dead(made: socket.socket) -> None:
    """Let the kernel end connections whose other side is gone without a word or takes nothing any
    more; accepted sockets inherit it."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in DEAD:
        if hasattr(socket, name):  # not every system has all of them
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def url(made: socket.socket) -> str:
    """Where a client finds the server."""
    host, port = str(made.getsockname()[0]), made.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or SIGINT: new requests are refused with 503, those that are here
    finish, then it ends. A second signal ends the process at once."""

    def __init__(
        self,
        app: FastAPI,
        service: Service,
        grace: float,
        ready: Callable[[], None],
        say: Callable[[str], None],
        **config: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "log_level": "warning",
            "access_log": False,
            "lifespan": "on",
            "server_header": False,
            "timeout_keep_alive": 75,
            "timeout_graceful_shutdown": 5,  # after the drain: connections, not requests
            "ws": "none",
        }
        super().__init__(uvicorn.Config(app, **{**settings, **config}))
        self._service, self._grace, self._ready, self._say = service, grace, ready, say
        self._draining: asyncio.Task[None] | None = None
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: FrameType | None) -> None:
            if self._signalled:
                os.write(2, b"Ended at once.\n")
                os._exit(ENDED + number)
            self._signalled = True
            loop.call_soon_threadsafe(self.drain)

        before = {s: signal.signal(s, handle) for s in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def drain(self) -> None:
        """Begin to stop (on the event loop)."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        now = self._service.snapshot()
        self._say(
            f"Draining: {now.running} running and {now.waiting} waiting, at most "
            f"{self._grace:g} s; another signal ends at once."
        )
        try:
            await self._service.drain(self._grace)
            await asyncio.sleep(0.05)  # what the last ones said is on its way
        finally:
            self.should_exit = True
