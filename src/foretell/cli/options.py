"""The options that commands share, declared once, in groups (`groups.py`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.core.errors import InputError
from foretell.core.registry import check_specs

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams


def opt(panel: str, help: str, *flags: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


DTYPES = ("auto", "float32", "bfloat16", "int8", "int4", "int4-g64", "int4-g128")
MODEL, SPECULATION, SAMPLING, STOPPING = "Model", "Speculation", "Sampling", "Length and stopping"
ModelPath = Annotated[
    str | None,
    opt(MODEL, "Checkpoint directory or hub id; without it the bundled model.", metavar="M"),
]
Dtype = Annotated[
    str,
    opt(MODEL, "auto, float32, bfloat16, or weights as int8, int4, int4-g64 or int4-g128."),
]
Device = Annotated[str, opt(MODEL, "auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, opt(MODEL, "CPU threads.")]
AllowLossy = Annotated[
    bool, opt(SPECULATION, "Allow methods that change what the model says.", "--allow-lossy")
]


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype} is unknown: use one of {', '.join(DTYPES)}.")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where it runs, and how it speculates."""

    model: ModelPath = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    threads: Threads = None
    deterministic: Annotated[
        bool,
        opt(
            MODEL,
            "Only arithmetic whose results do not depend on the batch, to the last bit (CPU).",
            "--deterministic",
        ),
    ] = False
    batch: Annotated[int, opt(MODEL, "Sequences decoded together.")] = 1
    kv_rows: Annotated[
        int | None, opt(MODEL, "Rows of the KV cache over all sequences; without it what fits.")
    ] = None
    draft: Annotated[
        str,
        opt(
            SPECULATION,
            "Drafter: name, name:key=value,... or a JSON object; none = plain decoding. "
            "auto = the drafter beside the model, else prompt-lookup.",
            metavar="SPEC",
        ),
    ] = "auto"
    verify: Annotated[
        str,
        opt(
            SPECULATION,
            "greedy, replay (both exact), rejection, block, ... (lossless; see foretell methods); "
            "auto = exact.",
            metavar="NAME",
        ),
    ] = "auto"
    policy: Annotated[
        str, opt(SPECULATION, "How much to draft, e.g. confidence:threshold=0.5.", metavar="SPEC")
    ] = "fixed"
    allow_lossy: AllowLossy = False

    def validate(self) -> None:
        """Everything that can be said before torch is imported and weights are read."""
        check_dtype(self.dtype)
        for flag in ("batch", "threads", "kv_rows"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise InputError(f"--{flag.replace('_', '-')} {value} makes no sense: at least 1.")
        check_specs(self.draft, self.verify, self.policy)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen and when to stop; `SamplingParams` on the command line."""

    max_tokens: Annotated[int, opt(STOPPING, "Most new tokens.")] = 128
    min_tokens: Annotated[int, opt(STOPPING, "Forbid ending before this many.")] = 0
    stop: Annotated[list[str] | None, opt(STOPPING, "Stop at this text. Repeatable.")] = None
    stop_token_id: Annotated[
        list[int] | None, opt(STOPPING, "Stop at this token id. Repeatable.")
    ] = None
    include_stop: Annotated[
        bool, opt(STOPPING, "Keep the stop text in the output.", "--include-stop")
    ] = False
    ignore_eos: Annotated[
        bool, opt(STOPPING, "Do not stop at the end-of-text token.", "--ignore-eos")
    ] = False
    temperature: Annotated[float, opt(SAMPLING, "0 = greedy.")] = 0.0
    top_p: Annotated[float, opt(SAMPLING, "Nucleus; 1 = off.")] = 1.0
    top_k: Annotated[int, opt(SAMPLING, "Only the k most likely; 0 = off.")] = 0
    min_p: Annotated[float, opt(SAMPLING, "At least this share of the best; 0 = off.")] = 0.0
    typical_p: Annotated[float, opt(SAMPLING, "Locally typical; 1 = off.")] = 1.0
    repetition_penalty: Annotated[float, opt(SAMPLING, "1 = off.")] = 1.0
    presence_penalty: Annotated[float, opt(SAMPLING, "0 = off.")] = 0.0
    frequency_penalty: Annotated[float, opt(SAMPLING, "0 = off.")] = 0.0
    logit_bias: Annotated[
        list[str] | None, opt(SAMPLING, "Add V to a token's logit. Repeatable.", metavar="ID=V")
    ] = None
    bad_word: Annotated[list[str] | None, opt(SAMPLING, "Never say this. Repeatable.")] = None
    allowed_ids: Annotated[
        str | None, opt(SAMPLING, "Only these token ids.", metavar="ID,ID,...")
    ] = None
    seed: Annotated[int | None, opt(SAMPLING, "Same seed, same text; else a fresh one.")] = None
    n: Annotated[int, opt(SAMPLING, "Continuations of every prompt.", "--n")] = 1
    logprobs: Annotated[
        int | None, opt(SAMPLING, "Log-probabilities of the N best at every token (JSON).")
    ] = None
    prompt_logprobs: Annotated[int | None, opt(SAMPLING, "The same over the prompt.")] = None

    def params(self) -> SamplingParams:
        """InputError names the flag."""
        from foretell.core.params import SamplingParams

        renamed = {
            "stop_token_ids": self.stop_token_id or (),
            "bad_words": self.bad_word or (),
            "stop": self.stop or (),
            "allowed_token_ids": _ids(self.allowed_ids),
            "logit_bias": _biases(self.logit_bias or []),
        }
        same = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in SamplingParams.__dataclass_fields__ and f.name not in renamed
        }
        try:
            return SamplingParams(**same, **renamed)
        except InputError as error:
            raise InputError(_with_flag(str(error))) from None


_FLAGS = {
    "stop_token_ids": "--stop-token-id",
    "bad_words": "--bad-word",
    "allowed_token_ids": "--allowed-ids",
}


def _with_flag(message: str) -> str:
    """'top_p=nan makes no sense' -> '--top-p nan makes no sense'."""

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        return _FLAGS.get(name, f"--{name.replace('_', '-')}") + " "

    return re.sub(r"^([a-z_]+)=", flag, message)


def _ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(t) for t in text.split(",") if t.strip()]
    except ValueError:
        raise InputError(f"--allowed-ids '{text}' is not a list of token ids like 5,17.") from None


def _biases(entries: list[str]) -> dict[int, float]:
    biases = {}
    for entry in entries:
        token, _, value = entry.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise InputError(f"--logit-bias '{entry}' is not of the form ID=V.") from None
    return biases
