"""The options of `foretell serve`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Annotated

from foretell.cli.common import threads_for
from foretell.cli.options import (
    MODEL,
    SPECULATION,
    AllowLossy,
    Device,
    Dtype,
    ModelPath,
    Threads,
    check_dtype,
    opt,
)
from foretell.core.errors import InputError
from foretell.core.registry import check_specs
from foretell.serve.build import ServeConfig

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
            check_least(flag, getattr(self, flag), 1)
        check_least("max_queue", self.max_queue, 0)
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


def check_least(flag: str, value: float | None, least: int) -> None:
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
