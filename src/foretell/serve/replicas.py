"""`foretell serve --replicas N`: N engines behind one address, through Ray Serve.

    client -> Ray's proxy -> Ingress -> the handle's router -> one of N replicas

Each replica is a process with its own model, cache and engine, and answers with the same app as a
server of one process: the ingress hands a request over as it came (`Call`), and what the app sends
comes back as it is. The router (`ray_routing`) sends a request to the replica that has read the
longest beginning of its prompt, and everything about a stream to the replica that holds it.

Nothing here imports Ray before `run` needs it. Ray's usage report is turned off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from foretell.core.errors import InputError

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]
BUILD = "foretell.serve.build:build"  # what makes (service, app) of the options in a replica
AFFINE = 16_384  # characters of a prompt that the router looks at
STREAM = re.compile(r"^/v1/streams/strm-([A-Za-z0-9]+)-")


@dataclass(slots=True)
class Call:
    """One HTTP request on its way to a replica. prompt: what decides who gets it ("" = anybody);
    owner: the replica that must get it, if there is one."""

    method: str
    path: str
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    client: tuple[str, int] | None = None
    prompt: str = ""
    owner: str = ""

    @classmethod
    def of(cls, scope: Mapping[str, Any], body: bytes) -> Call:
        """From an ASGI scope and the whole body."""
        path = scope["path"]
        found = STREAM.match(path)
        return cls(
            scope["method"],
            path,
            scope.get("query_string", b""),
            [(bytes(k), bytes(v)) for k, v in scope["headers"]],
            body,
            tuple(scope["client"]) if scope.get("client") else None,
            prompt_text(body) if scope["method"] == "POST" else "",
            found.group(1) if found else "",
        )

    def scope(self, replica: str) -> dict[str, Any]:
        """The ASGI scope that the app sees. "foretell.replica" becomes part of the ids of streams
        that it opens, which brings later requests about them here."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode("utf-8", "surrogatepass"),
            "root_path": "",
            "query_string": self.query,
            "headers": self.headers,
            "client": self.client,
            "server": None,
            "foretell.replica": replica,
        }


def prompt_text(body: bytes) -> str:
    """What a body asks the model to read, as text whose beginning equals that of another exactly
    where the prompts begin alike; "" when there is none. Never raises."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(parsed, dict):
        return ""
    prompt = parsed.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # of several prompts, the first decides
    if isinstance(prompt, str):
        return prompt[:AFFINE]
    if isinstance(prompt, list):  # ids: a character each, clear of the surrogates
        ids = (i for i in prompt[:AFFINE] if isinstance(i, int) and i >= 0)
        return "".join(chr(0x10000 + i % 0x100000) for i in ids)
    messages = parsed.get("messages")
    if not isinstance(messages, list):
        return ""
    said = (f"{m.get('role')}\n{_content(m.get('content'))}\n" for m in messages if type(m) is dict)
    return "".join(said)[:AFFINE]


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    return content if isinstance(content, str) else ""


async def answers(app: App, call: Call, replica: str) -> AsyncIterator[Message]:
    """Run one request through an ASGI app in this process; what the app sends, as it is sent.

    Closing the iterator early is a disconnect: the app is told, given a moment, then cancelled.
    What the app raises is raised here.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    inbox: deque[Message] = deque([{"type": "http.request", "body": call.body, "more_body": False}])
    gone = asyncio.Event()

    async def receive() -> Message:
        if inbox:
            return inbox.popleft()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if gone.is_set():
            raise OSError("The client is gone.")  # as a server with a closed socket does
        sent.put_nowait(message)

    async def work() -> None:
        try:
            await app(call.scope(replica), receive, send)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(work())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await task
    finally:
        gone.set()
        if not task.done():
            await asyncio.wait([task], timeout=1.0)
            task.cancel()
            with contextlib.suppress(BaseException):
                await task


def share(cores: float, replicas: int) -> tuple[int, float]:
    """(threads, processors to reserve) of each replica: whole processors where there are enough,
    else a part of one each."""
    whole = int(cores // replicas)
    return (whole, float(whole)) if whole else (1, max(0.01, int(100 * cores / replicas) / 100))


def merge_metrics(texts: Mapping[str, str]) -> str:
    """Prometheus expositions by replica -> one, every sample labelled with its replica."""
    heads: dict[str, list[str]] = {}  # family -> its HELP and TYPE lines, in order of appearance
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2] if line.count(" ") >= 2 else family
                lines = heads.setdefault(family, [])
                if line not in lines:
                    lines.append(line)
            elif line.strip():
                samples.setdefault(family, []).append(_labelled(line, f'replica="{replica}"'))
    families = dict.fromkeys([*heads, *samples])
    return "".join(
        f"{line}\n" for f in families for line in [*heads.get(f, ()), *samples.get(f, ())]
    )


def _labelled(line: str, label: str) -> str:
    name, brace, rest = line.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label}{'' if rest.startswith('}') else ','}{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{label}}} {value}"


def merge_stats(stats: Iterable[Mapping[str, Any]], now: float) -> dict[str, Any]:
    """The numbers of `/v1/foretell/stats`, summed over the replicas, at one clock."""
    total: dict[str, Any] = {}
    for one in stats:
        for key, value in one.items():
            if isinstance(value, bool):
                total[key] = total.get(key, True) and value
            else:
                total[key] = total.get(key, 0) + value
    return {**total, "time": now}


def run(
    replicas: int,
    options: Mapping[str, Any],
    *,
    build: str = BUILD,
    say: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Serve with `replicas` engines until SIGTERM or SIGINT (or `stop`), then finish what runs.

    options: those of `build`, as plain data; without "threads" the processors are shared out
    evenly. "host" and "port" are where Ray's proxy listens, "grace" the seconds that running
    requests have at the end. build: "module:function" that makes (service, app) in each replica.
    say: takes lines for a person; stderr without it. RAY_ADDRESS names a cluster that is already
    there; otherwise one is started on this machine and ends with us. Raises InputError.
    """
    if replicas < 1:
        raise InputError(f"--replicas {replicas} makes no sense: it is at least 1.")
    if find_spec("ray") is None:
        raise InputError("--replicas needs Ray, which is missing: pip install 'foretell[scale]'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # waiting threads sleep: replicas share cores
    try:
        from foretell.serve import ray_serve
    except ImportError as error:
        raise InputError(
            f"This Ray has no Serve with prefix-aware routing ({error}): "
            "pip install 'foretell[scale]' brings one that has."
        ) from None
    done, before = stop or threading.Event(), {}
    say = say or _note
    try:
        with ray_serve.cluster(replicas, options, build, say):
            before = _listen(done)  # only now: Ray brings handlers of its own when it starts
            while not done.wait(0.5):
                pass
            say("Draining: running requests finish, new ones are refused.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _listen(done: threading.Event) -> dict[int, Any]:
    """The first SIGTERM or SIGINT sets `done`, a second one ends the process at once. Returns the
    handlers there were; none where signals cannot be handled."""

    def handle(number: int, frame: Any) -> None:
        if done.is_set():
            os._exit(128 + number)
        done.set()

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
