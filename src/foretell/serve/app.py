"""The HTTP application: OpenAI's endpoints over a `Service`.

Bodies are read and validated from their bytes in one pass (`read`); that also keeps what Python's
own JSON reader lets through - NaN, half surrogate pairs, bottomless nesting - out of the server.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from foretell import __version__
from foretell.core.errors import InputError
from foretell.serve import errors, page, streams
from foretell.serve.answers.answer import Answer
from foretell.serve.answers.chat import Chat
from foretell.serve.answers.completion import Completion
from foretell.serve.blocks import BLOCK, Level
from foretell.serve.describe import DEFAULT, describe, takes
from foretell.serve.errors import bad_request
from foretell.serve.guard import ApiKeys, Guard
from foretell.serve.metrics import Metrics
from foretell.serve.prepare import Ask, Prepare
from foretell.serve.respond import read, respond, submit, unless_gone
from foretell.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from foretell.serve.service import Service
from foretell.serve.terms import Draining

S = TypeVar("S", bound=Sampling)
MAX_BODY = 4 << 20


def make_app(
    service: Service,
    *,
    names: Sequence[str],
    api_keys: Sequence[str] = (),
    allow_lossy: bool = False,
    cors_origins: Sequence[str] = (),
    max_body: int = MAX_BODY,
    max_model_len: int | None = None,
    level: Level = BLOCK,
) -> FastAPI:
    """The application; its lifespan starts and stops `service`, whose `on_done` it takes.

    names: what the model is called, the first one in answers; api_keys: without any, none is asked
    for; cors_origins: pages of these origins may call ("*": any); max_body: bytes; max_model_len:
    most tokens of prompt and answer together, None = what model and cache hold; level: how much
    answers tell about speculation. Raises InputError.
    """
    if service.llm.tokenizer is None:
        raise InputError("A server needs a tokenizer: point --model at a complete checkpoint.")
    prepare = Prepare(service.llm, names, context_of(service, max_model_len), allow_lossy)
    metrics = Metrics(names[0])
    metrics.watch(service)
    service.on_done = metrics.observe

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="foretell",
        version=__version__,
        summary="Language models that answer faster and say exactly the same",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    errors.install(app)
    app.include_router(_generation(service, prepare, level))
    app.include_router(_text(prepare))
    app.include_router(_state(service, prepare, metrics))
    app.include_router(page.router(service, names[0]))
    app.include_router(streams.router(service, prepare, level))
    app.add_middleware(Guard, keys=ApiKeys(api_keys), max_body=max_body)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    describe(app, secured=bool(api_keys))
    return app


def context_of(service: Service, max_model_len: int | None) -> int:
    """Most tokens of one request: what the model, the cache and the operator allow."""
    most = service.context
    if max_model_len is None:
        return most
    if not 2 <= max_model_len <= most:
        raise InputError(f"--max-model-len {max_model_len} is not possible: it lies in 2..{most}.")
    return max_model_len


def _generation(service: Service, prepare: Prepare, level: Level) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["generation"], responses=DEFAULT)
    tokenizer, model = service.llm.tokenizer, prepare.names[0]
    assert tokenizer is not None

    async def reply(
        request: Request,
        kind: type[S],
        prepared: Callable[[S, Headers], Awaitable[Ask]],
        answer: type[Answer],
    ) -> Response:
        body = await read(request, kind)
        prepare.check_model(body.model)
        ask = await prepared(body, request.headers)
        jobs = submit(service, ask)
        return await respond(
            request, answer(body, ask, jobs, tokenizer, body.model or model, level)
        )

    @routes.post("/completions", openapi_extra=takes(CompletionRequest, wishes=True))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await reply(request, CompletionRequest, prepare.completion, Completion)

    @routes.post("/chat/completions", openapi_extra=takes(ChatRequest, wishes=True))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await reply(request, ChatRequest, prepare.chat, Chat)

    return routes


def _text(prepare: Prepare) -> APIRouter:
    routes = APIRouter(tags=["text"], responses=DEFAULT)
    tokenizer = prepare.llm.tokenizer
    assert tokenizer is not None

    @routes.post("/tokenize", openapi_extra=takes(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        """The ids of a text or of a conversation."""
        body = await read(request, TokenizeRequest)
        prepare.check_model(body.model)
        ids = await unless_gone(request.receive, prepare.tokens(body))
        answer = {"count": len(ids), "max_model_len": prepare.context, "tokens": ids}
        shown = [tokenizer.token(i) for i in ids] if body.return_token_strs else None
        return {**answer, "token_strs": shown}

    @routes.post("/detokenize", openapi_extra=takes(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of ids, special tokens included."""
        body = await read(request, DetokenizeRequest)
        prepare.check_model(body.model)
        vocab = prepare.llm.model.spec.vocab
        wrong = next((t for t in body.tokens if t >= vocab), None)
        if wrong is not None:
            raise bad_request(f"Token id {wrong} is outside 0..{vocab - 1}.", "tokens")
        return {"prompt": tokenizer.decode(body.tokens, skip_special=False)}

    return routes


def _state(service: Service, prepare: Prepare, metrics: Metrics) -> APIRouter:
    routes = APIRouter(tags=["server"], responses=DEFAULT)
    since = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": since,
            "owned_by": "foretell",
            "root": prepare.names[0],
            "max_model_len": prepare.context,
        }

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What the model is called here."""
        return {"object": "list", "data": [card(n) for n in prepare.names]}

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One of those names."""
        prepare.check_model(model)
        return card(model)

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """200 when requests are taken, 503 while the server drains."""
        if service.snapshot().draining:
            raise Draining("The server is stopping and takes no new requests.")
        return {"status": "ok"}

    @routes.get("/metrics")
    async def prometheus() -> Response:
        """Prometheus' text format."""
        page, kind = metrics.page()
        return Response(page, media_type=kind)

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """The version of foretell."""
        return {"version": __version__}

    return routes
