"""The packed weights of a checkpoint, from the disk cache where they are there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from foretell.models.quant.content import store_key
from foretell.models.quant.formats import WeightFormat
from foretell.models.quant.store import StoreWriter, limit_bytes, open_store

Progress = Callable[[float, str], None]
# Everything that decides the packed bytes: where any of it changes, old files are no longer found.
_DECIDE = (
    "kernels/matrix.h",
    "kernels/pack.h",
    "kernels/pack.cpp",
    "models/native/packing.py",
    "models/quant/formats.py",
    "models/quant/checkpoints.py",
)


def cached_weights(
    folder: Path, kind: Any, progress: Progress | None = None
) -> tuple[str | None, Mapping[str, Tensor] | None]:
    """(key, tensors) of a checkpoint directory in a format of integers; the key is None where
    nothing is cached: floats, which are packed as quickly as they are read, and no cache."""
    if not isinstance(kind, WeightFormat) or limit_bytes() <= 0:
        return None, None
    key = store_key(folder, f"{kind} {_layout()}", progress)
    return key, open_store(key)


def keep(key: str, tensors: Mapping[str, Tensor], model: str, kind: Any) -> None:
    """Write what was made, for next time."""
    with StoreWriter(key, {"model": model, "format": str(kind)}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.commit()


@lru_cache(maxsize=1)
def _layout() -> str:
    root, whole = Path(__file__).parents[2], hashlib.sha256()
    for name in _DECIDE:
        whole.update(f"{name}\0".encode() + (root / name).read_bytes())
    return whole.hexdigest()
