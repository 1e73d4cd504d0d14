"""`foretell widen`: write a widened checkpoint and its draft, compare them with the originals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from foretell import __version__
from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.lab.check.prompts import PROMPTS
from foretell.lab.export.parts import Parts, weights_sha256
from foretell.lab.widen import Widener, labelled
from foretell.lab.widen_shape import Shape, choose_shape, short
from foretell.models.native.runner import NativeModel
from foretell.models.native.weights import Checkpoint, Source
from foretell.models.text.tokenizer import Tokenizer

SHARD = 1 << 30  # bytes of weights that are held before they are written
_TEXT = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*.model",
    "LICENSE*",
)
Progress = Callable[[float, str], None]


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
class Comparison:
    """The widened model against the original, both in float32, on the original's greedy texts."""

    prompts: int
    tokens: int  # greedy tokens compared
    different: int  # at which the widened model's first choice is another
    logit_difference: float  # the largest
    logit_range: float  # of the original's logits

    @property
    def passed(self) -> bool:
        return self.different == 0 and self.logit_difference <= 1e-3 * self.logit_range


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
        comparison = compare(folder, part, widener.dtype, settings, progress)
        if comparison is not None:
            _note(part, {"compared": asdict(comparison)})
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


def write(widener: Widener, folder: Path, out: Path, progress: Progress) -> None:
    """The widened checkpoint of `folder`, labelled, into the new folder `out`."""
    out.mkdir(parents=True)
    a = widener.old
    label = {
        "sha256": weights_sha256(folder),
        "parameters": a.parameters,
        "name": folder.name,
        "shape": asdict(Shape.of(a)),
        "foretell": __version__,
        "seed": widener.seed,
    }
    config = labelled(widener.config(), label)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in _TEXT:
        for path in folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
    (out / "README.md").write_text(_readme(widener, folder.name), encoding="utf-8")
    count = len(widener.new.layers)

    def told() -> Iterator[tuple[str, Tensor]]:
        seen = 0
        for i, item in enumerate(widener.tensors()):
            yield item
            if f".{seen}." in item[0] or i == 0:
                continue
            seen = min(seen + 1, count)
            progress(seen / count, f"layer {seen} of {count}")

    save_sharded(told(), out)


def save_sharded(tensors: Iterator[tuple[str, Tensor]], out: Path) -> None:
    """model.safetensors, or shards of about `SHARD` bytes with an index."""
    files: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        path = out / f"part-{len(files)}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        files.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
        if size >= SHARD:
            flush()
            size = 0
    if held:
        flush()
    if len(files) == 1:
        files[0][0].rename(out / "model.safetensors")
        return
    table = {}
    for i, (path, names) in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        path.rename(out / name)
        table |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": table}
    text = json.dumps(index, indent=2)
    (out / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


class _Rounded:
    """A checkpoint whose matrices went through `dtype`, as widening stores them."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype

    def has(self, name: str) -> bool:
        return self.source.has(name)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        x = self.source.get(name, shape)
        return x.to(self.dtype) if x.dim() > 1 else x

    def quantised(self, name: str, shape: tuple[int, int]) -> None:
        """Floats only: the check is of those."""
        return None

    def release(self) -> None:
        self.source.release()


@torch.inference_mode()
def compare(
    folder: Path, wide: Path, dtype: torch.dtype, settings: Settings, progress: Progress
) -> Comparison | None:
    """Greedy texts of the original (its matrices rounded to `dtype`), scored by both models."""
    if not settings.check:
        return None
    parts = Parts(folder)
    source = _Rounded(Checkpoint(folder), dtype)
    small = NativeModel(parts.arch, parts.names, source, torch.float32)
    texts = []
    for i, prompt in enumerate(_prompts(folder, parts.arch.vocab, settings.prompts)):
        room = parts.arch.max_positions - settings.tokens
        prompt = prompt[: max(1, room)]
        tokens = min(settings.tokens, parts.arch.max_positions - len(prompt))
        texts.append((prompt, _greedy(small, prompt, tokens)))
        progress((i + 1) / settings.prompts, "greedy text of the original")
    expected = [_score(small, p, o) for p, o in texts]
    del small, source
    big = NativeModel.load(wide, torch.float32)
    different, gap, span = 0, 0.0, 0.0
    for i, ((prompt, output), want) in enumerate(zip(texts, expected, strict=True)):
        got = _score(big, prompt, output)
        different += int((got.argmax(-1) != want.argmax(-1)).sum())
        gap = max(gap, float((got - want).abs().max()))
        span = max(span, float(want.max() - want.min()))
        progress((i + 1) / len(texts), "the same text by the widened model")
    return Comparison(len(texts), sum(len(o) for _, o in texts), different, gap, span)


def _greedy(model: NativeModel, prompt: list[int], tokens: int) -> list[int]:
    cache, rows, output, at = model.new_cache(len(prompt) + tokens), prompt, [], 0
    for _ in range(tokens):
        with model.open([cache]) as txn:
            where = np.arange(at, at + len(rows))
            segment = Segment(np.asarray(rows, np.int64), where, logits=np.asarray([len(rows) - 1]))
            logits = model.forward(PackedBatch([segment]), txn).logits
            txn.commit([range(len(rows))])
        at, rows = at + len(rows), [int(logits[0].argmax())]
        output += rows
    return output


def _score(model: NativeModel, prompt: list[int], output: list[int]) -> Tensor:
    """[n, V] logits of the rows that choose each token of `output`."""
    ids = np.asarray([*prompt, *output[:-1]], np.int64)
    rows = np.arange(len(prompt) - 1, len(ids))
    cache = model.new_cache(len(ids))
    with model.open([cache]) as txn:
        segment = Segment(ids, np.arange(len(ids)), logits=rows)
        return model.forward(PackedBatch([segment]), txn).logits.float().clone()


def _prompts(folder: Path, vocab: int, count: int) -> list[list[int]]:
    """Ids of the built-in prompts, or random ones where there is no tokenizer."""
    try:
        tokenizer = Tokenizer.load(folder)
        found = [tokenizer.encode(text) for text in PROMPTS]
    except InputError:
        found = []
    found = [ids for ids in found if ids and max(ids) < vocab]
    random = np.random.default_rng(0)
    while len(found) < count:
        found.append(random.integers(0, vocab, 12).tolist())
    return found[:count]


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
    comparison = compare(draft, out / "draft", widener.dtype, settings, progress)
    if comparison is not None:
        _note(out / "draft", {"compared": asdict(comparison)})
    return "widened", comparison


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


def _readme(widener: Widener, name: str) -> str:
    before, after = widener.old.parameters, widener.new.parameters
    return (
        f"# {name}, widened\n\n"
        f"Made by `foretell widen` from a model of {short(before)} parameters: it says exactly "
        f"what that one says, at the cost of {short(after)}. For measuring speed; "
        "its quality is that of the small model. `config.json` names the original under "
        "`foretell.widened_from`.\n"
    )
