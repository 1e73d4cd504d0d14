"""The OpenAPI document. Bodies are read by hand, so their schemas are added here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from foretell.core.params import PROMISES
from foretell.serve import schema

BODIES = (
    schema.CompletionRequest,
    schema.ChatRequest,
    schema.TokenizeRequest,
    schema.DetokenizeRequest,
)
REF = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_FAILURE = {"$ref": REF.format(model="Error")}
DEFAULT: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error, in OpenAI's shape.",
        "content": {"application/json": {"schema": _FAILURE}},
    }
}
_WISHES = (
    ("X-Foretell-Draft", {"type": "string"}, "A drafter the server offers, or off."),
    ("X-Foretell-Max-Draft", {"type": "integer", "minimum": 0}, "Most drafted tokens a step."),
    ("X-Foretell-Promise", {"enum": list(PROMISES)}, "The weakest promise that is accepted."),
)


def takes(body: type[BaseModel], wishes: bool = False) -> dict[str, Any]:
    """`openapi_extra` of an endpoint that reads `body`. wishes: and the speculation headers."""
    reference = {"schema": {"$ref": REF.format(model=body.__name__)}}
    extra: dict[str, Any] = {
        "requestBody": {"required": True, "content": {"application/json": reference}}
    }
    if wishes:
        extra["parameters"] = [
            {"name": n, "in": "header", "required": False, "schema": s, "description": d}
            for n, s, d in _WISHES
        ]
        extra["responses"] = {
            "200": {
                "description": "The answer, or with stream: true its chunks as events.",
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            }
        }
    return extra


def describe(app: FastAPI, secured: bool) -> None:
    """Give `app` its document; made when it is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, secured)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, secured: bool) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    _, defined = models_json_schema([(b, "validation") for b in BODIES], ref_template=REF)
    components = made.setdefault("components", {})
    known = components.setdefault("schemas", {})
    known.update(defined.get("$defs", {}))
    known["Error"] = ERROR
    for unused in ("HTTPValidationError", "ValidationError"):
        known.pop(unused, None)
    for path in made["paths"].values():
        for operation in path.values():
            answers = operation["responses"]
            answers.pop("422", None)  # bad input is a 400 here
            answers.setdefault("default", DEFAULT["default"])
    if secured:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made
