"""`foretell serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli.common import note, threads_for
from foretell.cli.options import (
    MODEL,
    SPECULATION,
    AllowLossy,
    Config,
    Device,
    Dtype,
    ModelPath,
    Threads,
    check_dtype,
    command,
    opt,
)
from foretell.core.errors import InputError
from foretell.core.registry import check_specs
from foretell.serve.build import ServeConfig

if TYPE_CHECKING:
    from foretell.engine.llm import LLM
    from foretell.serve.service import Service

app = typer.Typer(add_completion=False)
SERVER, LIMITS, ACCESS = "Server", "Limits", "Access"
LEVELS = ("none", "summary", "detailed")


@dataclass(frozen=True)
class ServeOptions:
    """Everything but --replicas and --config."""

    model: ModelPath = None
    served_model_name: Annotated[
        list[str] | None,
        opt(MODEL, "What clients call the model. Repeatable; the first stands in answers."),
    ] = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    threads: Threads = None
    deterministic: Annotated[
        bool,
        opt(MODEL, "Only arithmetic that does not depend on the batch.", "--deterministic"),
    ] = False
    draft: Annotated[
        str,
        opt(
            SPECULATION,
            "The default drafter: name, name:key=value,... or a JSON object; none = plain "
            "decoding. auto = the drafter beside the model, else prompt-lookup.",
            metavar="SPEC",
        ),
    ] = "auto"
    offer: Annotated[
        list[str] | None,
        opt(
            SPECULATION,
            "A further drafter that requests may choose. Repeatable; with --draft auto "
            "prompt-lookup and suffix unless given.",
            metavar="SPEC",
        ),
    ] = None
    verify: Annotated[
        str, opt(SPECULATION, "The rule; auto = exact. See foretell methods.", metavar="NAME")
    ] = "auto"
    policy: Annotated[str, opt(SPECULATION, "How much to draft.", metavar="SPEC")] = "goodput"
    allow_lossy: AllowLossy = False
    speculative_config: Annotated[
        str | None,
        opt(SPECULATION, "vLLM's JSON, in place of --draft: ngram, draft_model, suffix."),
    ] = None
    per_request_spec_decode_metrics: Annotated[
        str | None,
        opt(
            SPECULATION,
            "none: answers say nothing about speculation; summary or detailed: also under vLLM's "
            "names. Without it: a speculation block.",
            metavar="LEVEL",
        ),
    ] = None
    host: Annotated[str, opt(SERVER, "Address to listen on; 0.0.0.0 = all.")] = "127.0.0.1"
    port: Annotated[int, opt(SERVER, "Port; 0 = any free one.")] = 8000
    grace: Annotated[
        float, opt(SERVER, "Seconds that running requests have after SIGTERM or Ctrl-C.")
    ] = 30.0
    max_num_seqs: Annotated[int, opt(LIMITS, "Sequences decoded together.")] = 32
    max_model_len: Annotated[
        int | None, opt(LIMITS, "Most tokens of prompt and answer; without it the model's.")
    ] = None
    kv_rows: Annotated[
        int | None, opt(LIMITS, "Rows of the KV cache over all sequences; without it what fits.")
    ] = None
    max_queue: Annotated[int, opt(LIMITS, "Waiting requests; more are answered 429.")] = 256
    timeout: Annotated[
        float | None, opt(LIMITS, "Seconds a request may take, queueing included.")
    ] = None
    max_body: Annotated[int, opt(LIMITS, "Bytes of a request's body.")] = 4 << 20
    api_key: Annotated[
        list[str] | None,
        opt(ACCESS, "A key clients must send. Repeatable; also FORETELL_API_KEY=K,K,..."),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        opt(ACCESS, "Let pages of this origin call (* = any). Repeatable; off without it."),
    ] = None

    def config(self) -> ServeConfig:
        """Everything that can be said before torch is imported. InputError."""
        for flag in ("threads", "kv_rows", "max_num_seqs", "max_model_len", "max_body"):
            _least(flag, getattr(self, flag), 1)
        _least("max_queue", self.max_queue, 0)
        if not 0 <= self.grace < float("inf"):
            raise InputError(f"--grace {self.grace} makes no sense: it is 0 seconds or more.")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise InputError(f"--timeout {self.timeout} makes no sense: it is more than 0 seconds.")
        check_dtype(self.dtype)
        level = self.per_request_spec_decode_metrics
        if level is not None and level not in LEVELS:
            raise InputError(
                f"--per-request-spec-decode-metrics {level} is unknown: use {', '.join(LEVELS)}."
            )
        draft, verify = self._methods()
        renamed = {
            "served_names": _filled("--served-model-name", self.served_model_name),
            "threads": self.threads or threads_for(self.model),
            "draft": draft,
            "offer": None if self.offer is None else tuple(self.offer),
            "verify": verify,
            "api_keys": _keys(self.api_key),
            "cors_origins": _filled("--cors-origin", self.cors_origin),
            "spec_metrics": level,
        }
        return ServeConfig.of({**asdict(self), **renamed})

    def _methods(self) -> tuple[str, str]:
        draft, verify = self.draft, self.verify
        if self.speculative_config is not None:
            from foretell.serve.speculative_config import from_vllm

            if draft != "auto":
                raise InputError("Give --draft or --speculative-config, not both.")
            made = from_vllm(self.speculative_config)
            draft = made["draft"]
            if verify == "auto":
                verify = made.get("verify", verify)
        for drafter in (draft, *(self.offer or ())):
            check_specs(drafter, verify, self.policy)
        return draft, verify


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
    _least("replicas", replicas, 1)
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
        sampled = llm.verifier_for(SamplingParams(temperature=1.0)).name
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

    return str(llm.promise(SamplingParams(temperature=1.0 if _samples(llm) else 0.0)))


def _samples(llm: LLM) -> bool:
    from foretell.core.params import SamplingParams

    try:
        llm.verifier_for(SamplingParams(temperature=1.0))
    except InputError:
        return False
    return True


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:g} s"


def _least(flag: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        name = flag.replace("_", "-")
        raise InputError(f"--{name} {value} makes no sense: at least {least}.")


def _filled(flag: str, values: list[str] | None) -> tuple[str, ...]:
    if any(not v.strip() for v in values or ()):
        raise InputError(f"{flag} is empty: leave it out or give a value.")
    return tuple(dict.fromkeys(values or ()))


def _keys(given: list[str] | None) -> tuple[str, ...]:
    known = _filled("--api-key", given)
    more = [k.strip() for k in os.environ.get("FORETELL_API_KEY", "").split(",")]
    return tuple(dict.fromkeys([*known, *(k for k in more if k)]))
