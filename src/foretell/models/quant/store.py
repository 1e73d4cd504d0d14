"""The disk cache of packed weights: one file a model and format, mapped instead of made again.

A file is a 4096-byte block (magic, version, where the table is, its checksum), the tensors, each at
a multiple of 64 bytes, and a JSON table (name -> dtype, shape, offset). It is written under a
temporary name and renamed when it is whole and on disk, so a reader never sees half of one; a file
that is not exactly right is ignored.

It lies in $FORETELL_CACHE/weights or the user's cache folder. FORETELL_CACHE_GB (20) bounds the
folder: what was used longest ago goes first; 0 switches the cache off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.core.places import cache_folder

VERSION = 1
MAGIC = b"FTWEIGHT"
BLOCK = 4096  # bytes before the first tensor
ALIGN = 64
SUFFIX = ".weights"
DEFAULT_GB = 20.0
STALE = 24 * 3600  # seconds after which a temporary file has no writer any more
_HEADER = struct.Struct("<8sIIQQQ32s")  # magic, version, 0, file size, table at, its length, sha256
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_DTYPES = {str(t).removeprefix("torch."): t for t in (*_FLOATS, *_INTEGERS)}


def limit_bytes() -> int:
    """What the folder may hold; a FORETELL_CACHE_GB that is no number counts as the default."""
    try:
        return int(float(os.environ.get("FORETELL_CACHE_GB", DEFAULT_GB)) * 1e9)
    except (ValueError, OverflowError):
        return int(DEFAULT_GB * 1e9)


class Store(Mapping[str, Tensor]):
    """The tensors of one cached file, views of its mapping."""

    def __init__(self, path: Path, expected: str) -> None:
        """Raises ValueError or OSError where the file is not whole, or not of this key."""
        self.path = path
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            first = f.read(_HEADER.size)
            if len(first) < _HEADER.size:
                raise ValueError("cut off")
            magic, version, _, whole, at, length, checksum = _HEADER.unpack(first)
            if magic != MAGIC or version != VERSION or whole != size or at + length > size:
                raise ValueError("not a whole file of this version")
            f.seek(at)
            table = f.read(length)
            if hashlib.sha256(table).digest() != checksum:
                raise ValueError("its table is damaged")
            # a private mapping costs nothing and lets torch see it as writable memory
            self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        entries = json.loads(table)
        if entries["key"] != expected:
            raise ValueError("another model's")
        self.about: dict[str, Any] = entries["about"]
        self._tensors = {name: self._view(*e) for name, e in entries["tensors"].items()}

    def _view(self, dtype: str, shape: list[int], at: int) -> Tensor:
        kind, count = _DTYPES[dtype], torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=kind)
        return torch.frombuffer(self.map, dtype=kind, count=count, offset=at).view(shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_store(key: str) -> Store | None:
    """The tensors written under a key, or None."""
    path = cache_folder("weights") / (key + SUFFIX)
    if limit_bytes() <= 0:
        return None
    try:
        store = Store(path, key)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used just now
    return store


class StoreWriter:
    """Writes one file: `add` tensors in any order, then `commit`.

    As a context manager it leaves nothing behind unless `commit` was reached (Ctrl-C, errors).
    Where the disk is full or may not be written it says so once, on stderr, and does nothing more:
    a model works without its cache.
    """

    def __init__(self, key: str, about: Mapping[str, Any] | None = None) -> None:
        """about: what `foretell lab cache` shows (model, format)."""
        self.key, self.about = key, dict(about or {})
        self.path = cache_folder("weights") / (key + SUFFIX)
        self.part = self.path.with_name(f".{key}.{os.getpid()}.{time.monotonic_ns()}.part")
        self.tensors: dict[str, tuple[str, list[int], int]] = {}
        self.at = BLOCK
        self.file: Any = None
        if limit_bytes() <= 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.part.open("xb")
        except OSError as e:
            self._give_up(e.strerror or str(e))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add(self, name: str, tensor: Tensor) -> None:
        if self.file is None:
            return
        flat = tensor.detach().cpu().contiguous()
        self.tensors[name] = (str(flat.dtype).removeprefix("torch."), list(flat.shape), self.at)
        if flat.numel():
            self._write(self.at, flat.view(-1).view(torch.uint8).numpy().data)
        self.at += -(-flat.nbytes // ALIGN) * ALIGN
        if self.at > limit_bytes():
            self._give_up("the model is larger than FORETELL_CACHE_GB allows")

    def commit(self) -> bool:
        """Whether the file is now in its place."""
        if self.file is None:
            return False
        table = json.dumps(
            {"key": self.key, "about": self.about, "tensors": self.tensors}, separators=(",", ":")
        ).encode()
        checksum = hashlib.sha256(table).digest()
        size = self.at + len(table)
        first = _HEADER.pack(MAGIC, VERSION, 0, size, self.at, len(table), checksum)
        self._write(self.at, memoryview(table))
        self._write(0, memoryview(first.ljust(BLOCK, b"\0")))
        if self.file is None:
            return False
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.part.replace(self.path)
        except OSError as e:
            self._give_up(e.strerror or str(e))
            return False
        self.file = None
        evict(keep=self.path)
        return True

    def close(self) -> None:
        """Drop what was not committed."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None
        with contextlib.suppress(OSError):
            self.part.unlink(missing_ok=True)

    def _write(self, at: int, data: memoryview) -> None:
        if self.file is None:
            return
        try:
            self.file.seek(at)
            self.file.write(data)
        except OSError as e:
            self._give_up(e.strerror or str(e))

    def _give_up(self, why: str) -> None:
        self.close()
        print(
            f"The packed weights could not be kept in {self.path.parent} ({why}): they will be "
            "made again next time.",
            file=sys.stderr,
        )


@dataclass(frozen=True, slots=True)
class Cached:
    """One file of the cache."""

    path: Path
    bytes: int
    used: float  # seconds since the epoch
    about: Mapping[str, Any]  # {} where the file cannot be read


def cached() -> list[Cached]:
    """What the cache holds, last used first."""
    found = []
    for path in cache_folder("weights").glob("*" + SUFFIX):
        try:
            stat = path.stat()
        except OSError:
            continue
        about: Mapping[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = Store(path, path.name.removesuffix(SUFFIX)).about
        found.append(Cached(path, stat.st_size, stat.st_mtime, about))
    return sorted(found, key=lambda c: -c.used)


def clear() -> int:
    """Delete everything; returns the bytes freed. Models that run keep their mappings."""
    freed = 0
    folder = cache_folder("weights")
    for path in [*folder.glob("*" + SUFFIX), *folder.glob(".*.part")]:
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    shutil.rmtree(folder / "hashes", ignore_errors=True)
    return freed


def evict(keep: Path) -> None:
    """Delete what was used longest ago until the folder is within its bound."""
    files = []
    for path in cache_folder("weights").glob("*" + SUFFIX):
        with contextlib.suppress(OSError):
            stat = path.stat()
            files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit_bytes():
            break
        if path != keep:
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
    for part in cache_folder("weights").glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()
