"""Write a widened checkpoint, labelled, in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from foretell import __version__
from foretell.lab.export.parts import weights_sha256
from foretell.lab.widen.shape import Shape, short
from foretell.lab.widen.widener import Widener, labelled

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


def _readme(widener: Widener, name: str) -> str:
    before, after = widener.old.parameters, widener.new.parameters
    return (
        f"# {name}, widened\n\n"
        f"Made by `foretell widen` from a model of {short(before)} parameters: it says exactly "
        f"what that one says, at the cost of {short(after)}. For measuring speed; "
        "its quality is that of the small model. `config.json` names the original under "
        "`foretell.widened_from`.\n"
    )
