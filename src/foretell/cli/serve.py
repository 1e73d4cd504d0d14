"""`foretell serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.common import note
from foretell.cli.config import Config
from foretell.cli.groups import command
from foretell.cli.serve_options import SERVER, ServeOptions, check_least
from foretell.core.errors import InputError
from foretell.serve.build import ServeConfig

if TYPE_CHECKING:
    from foretell.engine.llm import LLM
    from foretell.serve.service import Service

app = typer.Typer(add_completion=False)


@app.command()
@command
def serve(
    options: ServeOptions,
    replicas: Annotated[
        int,
        typer.Option(
            rich_help_panel=SERVER, help="Engines behind this address, through Ray Serve."
        ),
    ] = 1,
    config: Config = None,
) -> None:
    """Serve a model over OpenAI's HTTP API, with a page to try it at /."""
    plain = options.config()
    check_least("replicas", replicas, 1)
    from foretell.serve.build import need_extra

    need_extra()
    if replicas > 1:
        from foretell.serve.replicas import run as run_replicas

        own = {"host": options.host, "port": options.port, "grace": options.grace}
        own["threads"] = options.threads  # None: the processors are shared out
        run_replicas(replicas, {**asdict(plain), **own})
        return
    _serve(options, plain)


def _serve(options: ServeOptions, plain: ServeConfig) -> None:
    from foretell.cli.common import status
    from foretell.cli.main import leave_at_once, raise_interrupts

    # As for the other commands (see load_llm): waiting threads sleep instead of spinning.
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    leave_at_once()
    try:
        with status("loading"):
            from foretell.serve.build import build
            from foretell.serve.server import Server, bind, url

            made = bind(options.host, options.port)
            service, application = build(plain)
    finally:
        raise_interrupts()
    for line in banner(service, plain, made.getsockname()[0]):
        note(line)
    address = url(made)
    ready = f"Serving at {address}/v1, a page at {address}/. Ctrl-C lets running requests finish."
    server = Server(application, service, options.grace, ready=lambda: note(ready), say=note)
    try:
        server.run(sockets=[made])
    finally:
        made.close()
    note("Stopped.")


def banner(service: Service, plain: ServeConfig, host: str) -> list[str]:
    """What is about to be served and how, the memory plan included."""
    from foretell import __version__
    from foretell.core.params import SamplingParams
    from foretell.serve.plan import make_plan

    llm, scheduler = service.llm, service.llm.engine.scheduler
    offers = service.offers
    sampled = "none: only temperature 0"
    if _samples(llm):
        sampled = llm.rules.verifier_for(SamplingParams(temperature=1.0)).name
    plan = make_plan(llm).lines()
    lines = [
        f"foretell {__version__} with {plain.model or 'the bundled model'}",
        f"  drafter  {offers[0]}; requests may choose {', '.join(offers[1:])}",
        f"  rule     {sampled} (greedy at temperature 0), promise {_promise(llm)}",
        f"  policy   {plain.policy}",
        f"  limits   {scheduler.max_batch} sequences at once, {plain.max_queue} waiting, "
        f"timeout {_seconds(plain.timeout)}",
        *(f"  {'memory' if i == 0 else '':9}{line}" for i, line in enumerate(plan)),
    ]
    if not plain.api_keys and not (host.startswith("127.") or host == "::1"):
        lines.append("  warning  no --api-key: whoever reaches this address may use it")
    return lines


def _promise(llm: LLM) -> str:
    from foretell.core.params import SamplingParams

    return str(llm.rules.promise(SamplingParams(temperature=1.0 if _samples(llm) else 0.0)))


def _samples(llm: LLM) -> bool:
    from foretell.core.params import SamplingParams

    try:
        llm.rules.verifier_for(SamplingParams(temperature=1.0))
    except InputError:
        return False
    return True


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:g} s"
