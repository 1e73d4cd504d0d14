"""From plain options to a service and its app: what `foretell serve` and its replicas start with.

Nothing heavy is imported before `build` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from foretell.core.errors import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from foretell.engine.llm import LLM
    from foretell.serve.service import Service

OFFERED = ("prompt-lookup", "suffix")  # beside the default drafter, where --draft is auto


@dataclass(frozen=True)
class ServeConfig:
    """A server, in plain data: it can be pickled and sent to another process."""

    model: str | None = None  # checkpoint directory or hub id; None = the bundled one
    served_names: tuple[str, ...] = ()  # () = the model's own name
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    deterministic: bool = False
    draft: str = "auto"
    offer: tuple[str, ...] | None = None  # drafters to choose from; None = OFFERED with draft auto
    verify: str = "auto"
    policy: str = "goodput"
    allow_lossy: bool = False
    max_num_seqs: int = 32
    max_model_len: int | None = None
    kv_rows: int | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    timeout: float | None = None
    max_queue: int = 256
    max_body: int = 4 << 20
    spec_metrics: str | None = None  # none, summary, detailed

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ServeConfig:
        """From a mapping that may hold more than a server needs."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in options.items() if k in known})


def build(
    options: Mapping[str, Any] | ServeConfig,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Service, FastAPI]:
    """Load the model and make the service and its app; the app's lifespan starts the service.

    progress(fraction, what) is called while weights are read. Raises InputError.
    """
    config = options if isinstance(options, ServeConfig) else ServeConfig.of(options)
    need_extra()
    from foretell.serve.app import make_app
    from foretell.serve.blocks import Level
    from foretell.serve.plan import make_plan
    from foretell.serve.service import Service
    from foretell.serve.terms import Limits

    llm = load(config, progress)
    make_plan(llm).check()
    service = Service(llm, Limits(max_queue=config.max_queue, timeout=config.timeout))
    app = make_app(
        service,
        names=config.served_names or (own_name(config, llm),),
        api_keys=config.api_keys,
        allow_lossy=config.allow_lossy,
        cors_origins=config.cors_origins,
        max_body=config.max_body,
        max_model_len=config.max_model_len,
        level=Level.of(config.spec_metrics),
    )
    return service, app


def load(config: ServeConfig, progress: Callable[[float, str], None] | None = None) -> LLM:
    """The engine, with every drafter that is offered."""
    from foretell.engine.llm import LLM

    engine: dict[str, Any] = {
        "verify": config.verify,
        "policy": config.policy,
        "max_batch": config.max_num_seqs,
        "kv_rows": config.kv_rows,
        "allow_lossy": config.allow_lossy,
    }
    llm = LLM.load(
        config.model,
        draft=config.draft,
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        deterministic=config.deterministic,
        progress=progress,
        **engine,
    )
    offer = config.offer
    if offer is None:
        offer = OFFERED if config.draft == "auto" else ()
    if not offer or llm.drafter.name == "none":
        return llm
    first = _part(llm.drafter.name if config.draft == "auto" else config.draft)
    others = [_part(o) for o in offer if _name(o) not in (llm.drafter.name, "none", "off")]
    if not others:
        return llm
    return llm.with_methods(draft=f"choice:of={'+'.join([first, *others])}", **engine)


def own_name(config: ServeConfig, llm: LLM) -> str:
    """What a model is called when nobody says: its directory or hub id, never a whole path."""
    if config.model is None:
        return "foretell-base"
    name = config.model.rstrip("/")
    return (
        name
        if name.count("/") == 1 and not name.startswith((".", "~", "/"))
        else (name.rsplit("/", 1)[-1] or llm.model.spec.name or "model")
    )


def need_extra() -> None:
    """InputError when the extra `serve` is not installed."""
    from importlib.util import find_spec

    for module in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(module) is None:
            raise InputError(
                f"The server needs {module}, which is not installed: pip install 'foretell[serve]'."
            )


def _name(spec: str) -> str:
    from foretell.core.registry import Spec

    return Spec.parse(spec).name


def _part(spec: str) -> str:
    """`name:key=value` as a part of a composition: `name(key=value)`."""
    from foretell.core.registry import Spec

    parsed = Spec.parse(spec)
    options = ",".join(f"{k}={v}" for k, v in parsed.options.items())
    return f"{parsed.name}({options})" if options else parsed.name
