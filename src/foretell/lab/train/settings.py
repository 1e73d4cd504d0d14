"""What a user can choose about `foretell train base`, its defaults, and the checks on it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from foretell.core.errors import InputError
from foretell.lab.train.loop import Plan, save_text_atomically
from foretell.lab.train.network import LlamaShape

MAX_POSITIONS = 2048
PRESETS: dict[str, dict[str, dict[str, int]]] = {
    "cpu": {
        "target": {"hidden": 256, "layers": 10, "heads": 8, "kv_heads": 4, "ffn": 640},
        "draft": {"hidden": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 320},
        "batch": {"batch_tokens": 4096, "row": 512, "long_row": 2048},
    },
    "gpu": {
        "target": {"hidden": 512, "layers": 10, "heads": 8, "kv_heads": 4, "ffn": 1280},
        "draft": {"hidden": 256, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 640},
        "batch": {"batch_tokens": 65536, "row": 1024, "long_row": 2048},
    },
}


@dataclass(frozen=True)
class BaseSettings:
    """Everything a user can choose; `None` means: the preset or the default decides."""

    out: Path
    run_dir: Path
    corpora: dict[str, Path] = field(default_factory=dict)  # name -> file, beside the stdlib
    weights: dict[str, float] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    size: str | None = None
    minutes: float | None = None
    tokens: int | None = None  # for both networks, instead of minutes
    draft_share: float = 0.28  # of the budget
    vocab: int = 4096
    target_shape: dict[str, int] = field(default_factory=dict)
    draft_shape: dict[str, int] = field(default_factory=dict)
    batch: dict[str, int] = field(default_factory=dict)
    stdlib: bool = True
    checkpoint_minutes: float = 3.0
    compile: bool = True
    seed: int = 0
    command: str = "foretell train base"  # as the user typed it, for the model card


def plan_for(
    settings: BaseSettings,
    batch: dict[str, int],
    share: float,
    matrix_lr: float,
    vector_lr: float,
) -> Plan:
    return Plan(
        seconds=None if settings.minutes is None else settings.minutes * 60 * share,
        tokens=None if settings.tokens is None else int(settings.tokens * share),
        matrix_lr=matrix_lr,
        vector_lr=vector_lr,
        checkpoint_seconds=settings.checkpoint_minutes * 60,
        **batch,
    )


def shape_of(vocab: int, sizes: dict[str, int]) -> LlamaShape:
    """Checked sizes; the sentence names what does not fit."""
    known = ("hidden", "layers", "heads", "kv_heads", "ffn")
    unknown = sizes.keys() - set(known)
    if unknown:
        raise InputError(f"unknown size '{min(unknown)}'; use {', '.join(known)}.")
    if min(sizes.values()) < 1:
        raise InputError("every size of a network must be at least 1.")
    if sizes["hidden"] % (2 * sizes["heads"]) or sizes["heads"] % sizes["kv_heads"]:
        raise InputError(
            f"hidden={sizes['hidden']} must be a multiple of 2 * heads={sizes['heads']}, "
            f"and heads a multiple of kv_heads={sizes['kv_heads']}."
        )
    return LlamaShape(vocab=vocab, max_positions=MAX_POSITIONS, **sizes)


def mixture_weights(names: list[str], chosen: dict[str, float]) -> dict[str, float]:
    """Chosen shares; whoever was given none splits what is left equally."""
    unknown = chosen.keys() - set(names)
    if unknown:
        raise InputError(f"--weight names '{min(unknown)}', which is none of: {', '.join(names)}.")
    if not all(0 < weight <= 1 for weight in chosen.values()):
        raise InputError("every --weight is a share above 0 and at most 1.")
    rest = [name for name in names if name not in chosen]
    left = max(1.0 - sum(chosen.values()), 0.0)
    if rest and left == 0.0:
        raise InputError(f"the weights leave nothing for {', '.join(rest)}.")
    return chosen | {name: left / len(rest) for name in rest}


def prepare_folders(
    settings: BaseSettings, target: LlamaShape, draft: LlamaShape, batch: dict[str, int]
) -> None:
    """Make both folders; refuse to continue a run whose networks or data were others.

    Budget and weights may change between two parts of a run: the schedule follows the new ones.
    """
    if (settings.minutes is None) == (settings.tokens is None):
        raise InputError("give either --minutes or --tokens.")
    if not settings.stdlib and not settings.corpora:
        raise InputError("there is nothing to train on: give a --corpus or leave the stdlib in.")
    unknown = batch.keys() - PRESETS["cpu"]["batch"].keys()
    if unknown:
        raise InputError(f"--batch knows batch_tokens, row and long_row, not '{min(unknown)}'.")
    if not 1 <= batch["row"] <= batch["long_row"] <= min(batch["batch_tokens"], MAX_POSITIONS):
        raise InputError(
            f"--batch: row, long_row and batch_tokens must ascend from 1, "
            f"and long_row is at most {MAX_POSITIONS}."
        )
    if not 260 <= settings.vocab <= 65536:
        raise InputError("--vocab must lie between 260 and 65536.")
    for path in settings.corpora.values():
        if not path.is_file():
            raise InputError(f"there is no corpus file {path}.")
    for folder in (settings.out, settings.run_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}.") from None
    identity = {
        "target": target.as_dict(),
        "draft": draft.as_dict(),
        "batch": batch,
        "corpora": sorted(settings.corpora),
        "stdlib": settings.stdlib,
        "seed": settings.seed,
    }
    record = settings.run_dir / "run.json"
    if record.exists() and json.loads(record.read_text()) != identity:
        raise InputError(
            f"{settings.run_dir} holds a run with other settings; "
            f"name another --run-dir or delete it."
        )
    save_text_atomically(json.dumps(identity, indent=1), record)


def start_over(run_dir: Path) -> None:
    """Forget what an earlier run left; only files a run writes are removed."""
    for name in ("run.json", "tokenizer.json", "target.pt", "draft.pt"):
        (run_dir / name).unlink(missing_ok=True)
