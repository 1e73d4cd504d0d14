"""The part of `replicas` that Ray runs: the router, the replica and the ingress.

Imported only where Ray is there (extra `scale`); written for Ray Serve 2.60.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.serve.config import (  # pyright: ignore[reportMissingImports]
    HTTPOptions,
    RequestRouterConfig,
)
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from foretell.serve.errors import ApiError
from foretell.serve.replicas import Call, Message, answers, merge_metrics, merge_stats, share

try:
    from ray.serve.llm.request_router import (  # pyright: ignore[reportMissingImports]
        PrefixCacheAffinityRouter,
    )
except ImportError:  # its package wants vLLM or SGLang beside it; the router itself does not
    from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import (  # pyright: ignore[reportMissingImports]
        PrefixCacheAffinityRouter,
    )

log = logging.getLogger("foretell.serve")
ASIDE = ("/metrics", "/v1/foretell/stats")  # answered by all replicas together
PATIENCE = 10.0  # seconds that all of them have for it
APP = "foretell"
ONGOING = (
    100_000  # requests Ray lets through to a replica: its own queue limit is the one that counts
)
MAX_BODY = 4 << 20  # where the options name none
IMBALANCE = 8  # requests by which one replica may be busier before the prefix no longer decides


class AffinityRouter(PrefixCacheAffinityRouter):
    """Ray's prefix-aware router, and two rules before it: what belongs to a replica goes there
    (streams), and what has no prompt goes to the less busy of two."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        call = _call(pending_request)
        if call is not None and call.owner:
            owners = [r for r in candidate_replicas if r.replica_id.unique_id == call.owner]
            if owners:
                return [owners]
        if call is None or not call.prompt:
            pending_request = None  # without one, the base class looks at the load alone
        return await super().choose_replicas(candidate_replicas, pending_request)

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        call = _call(pending_request)
        if call is not None and call.prompt:
            super().on_request_routed(pending_request, replica_id, result)


def _call(pending: Any) -> Call | None:
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, Call) else None


class Replica:
    """One engine and its app, in a process of its own. build: "module:function" that makes
    (service, app) of the options."""

    async def __init__(self, build: str, options: dict[str, Any]) -> None:
        module, _, function = build.partition(":")
        self.name = serve.get_replica_context().replica_id.unique_id
        self.service, self.app = getattr(import_module(module), function)(options)
        self._life = contextlib.AsyncExitStack()
        await self._life.enter_async_context(self.app.router.lifespan_context(self.app))

    async def answer(self, call: Call) -> AsyncIterator[Message]:
        """The app's answer to one request, message by message."""
        async for message in answers(self.app, call, self.name):
            yield message

    async def whole(self, call: Call) -> tuple[str, int, bytes]:
        """(replica, status, body) of a short answer."""
        status, body = 500, b""
        async for message in answers(self.app, call, self.name):
            status = message.get("status", status)
            body += message.get("body", b"")
        return self.name, status, body

    async def __del__(self) -> None:
        await self._life.aclose()


class Ingress:
    """Takes HTTP from Ray's proxy and hands it to a replica as it came."""

    def __init__(self, engines: Any, max_body: int) -> None:
        self.engines, self.max_body = engines, max_body

    async def __call__(self, request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > self.max_body:
                too_long = f"The body has more than {self.max_body} bytes: shorten it."
                return ApiError(413, too_long, code="too_large").response()
        call = Call.of(request.scope, body)
        if call.path in ASIDE and call.method == "GET":
            return await self._aside(call)
        messages = self.engines.answer.options(stream=True).remote(call)
        try:
            start = await anext(messages)
        except Exception as error:  # its process died, or it is being replaced
            log.error("a replica did not answer", exc_info=error)
            again = {"Retry-After": "5"}
            return ApiError(503, "The replica did not answer.", headers=again).response()
        response = StreamingResponse(_bodies(messages), start["status"])
        response.raw_headers = [(bytes(k), bytes(v)) for k, v in start["headers"]]
        return response

    async def _aside(self, call: Call) -> Response:
        asked = self.engines.broadcast("whole", call)
        found = await asked.results_async(timeout_s=PATIENCE, return_exceptions=True)
        good = [one for one in found if not isinstance(one, Exception)]
        if not good:
            return ApiError(503, "No replica answers.", headers={"Retry-After": "5"}).response()
        refused = [one for one in good if one[1] != 200]
        if refused:
            return Response(refused[0][2], refused[0][1], media_type="application/json")
        if call.path == "/metrics":
            texts = {name: text.decode() for name, _, text in sorted(good)}
            return Response(merge_metrics(texts), media_type="text/plain; version=0.0.4")
        parts = [json.loads(text) for _, _, text in good]
        return Response(
            json.dumps(merge_stats(parts, time.monotonic())), media_type="application/json"
        )


async def _bodies(messages: Any) -> AsyncIterator[bytes]:
    """The bodies of an answer; whoever stops reading cancels it at the replica."""
    try:
        async for message in messages:
            if body := message.get("body", b""):
                yield body
    finally:
        messages.cancel()


@contextlib.contextmanager
def cluster(
    replicas: int, options: Mapping[str, Any], build: str, say: Callable[[str], None]
) -> Iterator[None]:
    """Replicas, ingress and proxy run inside; leaving it drains and ends them."""
    host, port = options.get("host", "127.0.0.1"), options.get("port", 8000)
    grace = options.get("grace", 30.0)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}
    ray.init(ignore_reinit_error=True, **({} if os.environ.get("RAY_ADDRESS") else quiet))
    try:
        there = ray.cluster_resources()
        threads, cpus = share(there.get("CPU", 1.0), replicas)
        gpus = 1.0 if there.get("GPU", 0.0) >= replicas and options.get("device") != "cpu" else 0.0
        given = {**options, "threads": options.get("threads") or threads}
        engines = serve.deployment(
            Replica,
            name="engine",
            num_replicas=replicas,
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
            max_ongoing_requests=ONGOING,
            graceful_shutdown_timeout_s=grace,
            graceful_shutdown_wait_loop_s=0.2,
            request_router_config=RequestRouterConfig(
                request_router_class=f"{__name__}:{AffinityRouter.__name__}",
                request_router_kwargs={"imbalanced_threshold": IMBALANCE, "do_eviction": True},
            ),
        ).bind(build, given)
        ingress = serve.deployment(
            Ingress,
            name="ingress",
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=ONGOING,
            graceful_shutdown_timeout_s=grace + 5,
            graceful_shutdown_wait_loop_s=0.2,
        ).bind(engines, int(options.get("max_body") or MAX_BODY))
        serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=_quiet())
        serve.run(ingress, name=APP, route_prefix="/", logging_config=_quiet())
        say(f"{replicas} replicas of {given['threads']} threads at http://{host}:{port}")
        yield
        serve.delete(APP)
    finally:
        serve.shutdown()
        ray.shutdown()


def _quiet() -> dict[str, Any]:
    return {"log_level": "ERROR", "enable_access_log": False}
