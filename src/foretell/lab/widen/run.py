"""`foretell widen`: write a widened checkpoint and its draft, compare them with the originals."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from foretell.core.errors import InputError
from foretell.lab.export.parts import Parts
from foretell.lab.widen.compare import Comparison, compare
from foretell.lab.widen.shape import Shape, choose_shape, short
from foretell.lab.widen.widener import Widener
from foretell.lab.widen.write import Progress, write


@dataclass(frozen=True)
class Settings:
    parameters: float | None = None  # about how many the widened model shall have
    shape: Shape | None = None  # sizes that are asked for
    draft_parameters: float | None = None  # None = the draft is copied as it is
    dtype: str = "auto"  # float32, bfloat16, float16; auto = as stored
    check: bool = True
    prompts: int = 8
    tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Widened:
    folder: Path
    shape: Shape
    parameters: int
    before: int
    comparison: Comparison | None
    draft: str = "none"  # copied, widened

    @property
    def passed(self) -> bool:
        return self.comparison is None or self.comparison.passed


def plan(folder: Path, settings: Settings) -> tuple[Widener, str]:
    """What would be written, and its shape in words. InputError when that cannot be."""
    parts = Parts(folder)
    shape = choose_shape(parts.arch, settings.parameters, settings.shape)
    dtype = _dtype(settings.dtype, parts.embedding().dtype)
    widener = Widener(parts, shape, dtype, settings.seed)
    a = widener.new
    words = (
        f"{short(parts.arch.parameters)} -> {short(a.parameters)} parameters: hidden {a.hidden}, "
        f"{len(a.layers)} layers, {a.heads} heads / {a.kv_heads} kv of {a.head_dim}, ffn {a.ffn}, "
        f"{str(dtype).removeprefix('torch.')}"
    )
    return widener, words


def widen(folder: Path, out: Path, settings: Settings, progress: Progress) -> Widened:
    """Write the widened model of `folder` to `out`, with its draft, if it passes the comparison.

    Nothing is left when it does not pass, fails or is interrupted. InputError for wishes that
    cannot be met. Peak memory: one shard and one matrix, then (for the comparison) both models in
    float32.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists already: name a new folder.")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no directory {out.parent}.")
    widener, _ = plan(folder, settings)
    if settings.check:
        _enough_memory(widener.new.parameters)
    part = out.parent / f".{out.name}.{os.getpid()}.part"
    try:
        write(widener, folder, part, progress)
        comparison = _compared(folder, part, widener, settings, progress)
        draft, whole = _draft(folder, part, settings, progress)
        result = Widened(
            out,
            Shape.of(widener.new),
            widener.new.parameters,
            widener.old.parameters,
            comparison if whole is None or whole.passed else whole,
            draft,
        )
        if result.passed:
            if out.exists():
                out.rmdir()
            part.rename(out)
        return result
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _draft(
    folder: Path, out: Path, settings: Settings, progress: Progress
) -> tuple[str, Comparison | None]:
    draft = folder / "draft"
    if not (draft / "config.json").is_file():
        if settings.draft_parameters is not None:
            raise InputError(f"{folder} has no draft/ to widen: leave --draft-params out.")
        return "none", None
    if settings.draft_parameters is None:
        shutil.copytree(draft, out / "draft")
        return "copied", None
    wish = Settings(settings.draft_parameters, None, None, settings.dtype, seed=settings.seed)
    widener, _ = plan(draft, wish)
    write(widener, draft, out / "draft", progress)
    return "widened", _compared(draft, out / "draft", widener, settings, progress)


def _compared(
    folder: Path, out: Path, widener: Widener, settings: Settings, progress: Progress
) -> Comparison | None:
    """The comparison, noted in the label, where one is wanted."""
    if not settings.check:
        return None
    found = compare(folder, out, widener.dtype, settings.prompts, settings.tokens, progress)
    _note(out, {"compared": asdict(found)})
    return found


def _note(folder: Path, more: dict[str, Any]) -> None:
    """Add to the label in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["foretell"]["widened_from"] |= more
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _dtype(name: str, stored: torch.dtype) -> torch.dtype:
    if name == "auto":
        return stored
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {name} is unknown: use float32, bfloat16 or float16.")
    return getattr(torch, name)


def _enough_memory(parameters: int) -> None:
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = [int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable")]
        have = max([pages, *free])
    except (OSError, ValueError):
        return
    if 4.5 * parameters > have:
        raise InputError(
            f"Comparing {short(parameters)} parameters in float32 takes {4.5e-9 * parameters:.0f} "
            f"GB and {have / 1e9:.0f} GB are free: ask for fewer, or --no-check."
        )
