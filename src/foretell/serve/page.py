"""The page at `/`: a playground and three charts, and the two small answers that feed it.

The files lie in the package and are read once; nothing in a request names a file. They need no key
(they hold none and show nothing of the model); what they ask for under `/v1` does.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response

from foretell import __version__
from foretell.core.errors import InputError
from foretell.core.registry import lookup
from foretell.serve.describe import DEFAULT
from foretell.serve.service import Service

FILES = {  # address below /page -> media type; the package's folder `page` holds them
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    # Nothing but the page's own files, no inline code or style, no frames around it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asks each time; the tag makes the answer short
}


@dataclass(frozen=True)
class File:
    """One of the page's files: bytes, media type, entity tag."""

    body: bytes
    kind: str
    tag: str


def load_files() -> dict[str, File]:
    """The page's files by name, from the package."""
    folder = files("foretell.serve").joinpath("page")
    found = {}
    for name, kind in FILES.items():
        body = folder.joinpath(name).read_bytes()
        found[name] = File(body, kind, f'"{hashlib.sha256(body).hexdigest()[:20]}"')
    return found


def stats(service: Service) -> dict[str, Any]:
    """Where the server stands, for the charts. Totals count since the start; `time` is seconds of
    a clock that only goes forward, so that two answers give a rate. Tokens per forward and sequence
    are generated / (generated - accepted)."""
    now = service.snapshot()
    return {
        "time": time.monotonic(),
        "running": now.running,
        "waiting": now.waiting,
        "streams": now.streams,
        "kv_rows": now.kv_rows,
        "kv_used": now.kv_used,
        "kv_kept": now.kv_kept,
        "generated_tokens": now.generated_tokens_total,
        "drafts": now.num_drafts_total,
        "draft_tokens": now.draft_tokens_total,
        "accepted_tokens": now.accepted_tokens_total,
        "preemptions": now.preemptions_total,
        "tokens_per_second": now.tokens_per_second,
        "draining": now.draining,
    }


def methods(service: Service, model: str) -> dict[str, Any]:
    """What a request may choose from: drafters, the default first, and whether chat is there."""
    names = [name for name in service.offers if name != "off"]
    tokenizer = service.llm.tokenizer
    return {
        "model": model,
        "version": __version__,
        "default": names[0],
        "drafters": [_describe(name) for name in names],
        "chat": tokenizer is not None and tokenizer.has_chat_template,
    }


def _describe(name: str) -> dict[str, str]:
    try:
        cls = lookup("drafter", name)
    except InputError:  # an operator's own name for a combination
        return {"name": name, "summary": "", "paper": ""}
    return {
        "name": name,
        "summary": getattr(cls, "summary", ""),
        "paper": getattr(cls, "paper", ""),
    }


def router(service: Service, model: str) -> APIRouter:
    """`/`, `/page/*`, `/v1/foretell/stats` and `/v1/foretell/methods`. model: the served name."""
    found = load_files()
    routes = APIRouter(tags=["page"], responses=DEFAULT)

    def send(request: Request, name: str) -> Response:
        file = found[name]
        headers = {**HEADERS, "ETag": file.tag}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.kind, headers=headers)

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return send(request, "index.html")

    for name in found:

        @routes.api_route(f"/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
        async def one(request: Request, name: str = name) -> Response:
            return send(request, name)

    @routes.get("/v1/foretell/stats")
    async def get_stats() -> dict[str, Any]:
        """Where the server stands: running and waiting requests, tokens, drafts."""
        return stats(service)

    @routes.get("/v1/foretell/methods")
    async def get_methods() -> dict[str, Any]:
        """The drafters a request may choose from."""
        return methods(service, model)

    return routes
