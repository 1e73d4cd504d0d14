"""The key of a checkpoint's packed weights: a hash of everything they are made from.

Names, sizes and times do not identify weights, so every byte is hashed; once a file, because the
result is remembered under what changes whenever the file does (path, size, inode, times).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from foretell.core.places import cache_folder

CHUNK = 64 << 20  # bytes hashed as one piece, several at a time
SETTLED = 2.0  # seconds since its last change from which a file's times say that it is unchanged
_WEIGHTS = ("*.safetensors", "*.bin", "*.json")


def store_key(
    folder: Path, layout: str, progress: Callable[[float, str], None] | None = None
) -> str:
    """The key under which the weights of a checkpoint directory are cached. layout: all else that
    decides the packed bytes (format, versions of quantiser and packing, instruction set)."""
    names = sorted({p for pattern in _WEIGHTS for p in folder.glob(pattern)})
    parts = [p for p in names if p.suffix != ".json" or p.name in _CONFIGS or "index" in p.name]
    whole = hashlib.sha256(layout.encode())
    for i, path in enumerate(parts):
        if progress is not None:
            progress(i / len(parts), "reading the weights once for the cache's key")
        whole.update(f"\0{path.name}\0{file_hash(path)}".encode())
    return whole.hexdigest()[:40]


_CONFIGS = ("config.json", "quantize_config.json")


def file_hash(path: Path) -> str:
    """A hash of a file's content, from memory where the file has not been touched since."""
    path = path.resolve()
    before = _state(path)
    note = cache_folder("weights") / "hashes" / hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["state"] == before:
            return known["hash"]
    found = _hash(path)
    newest = max(before[3], before[4]) / 1e9
    if _state(path) == before and abs(time.time() - newest) > SETTLED:
        _remember(note, {"state": before, "hash": found})
    return found


def _state(path: Path) -> list[int]:
    s = path.stat()
    return [s.st_size, s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns]


def _hash(path: Path) -> str:
    """sha256 over the sha256 of each chunk, on two threads (hashing releases the interpreter)."""
    size = path.stat().st_size

    def piece(at: int) -> bytes:
        digest = hashlib.sha256()
        with path.open("rb") as f:
            f.seek(at)
            left = min(CHUNK, size - at)
            while left > 0 and (data := f.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
        return digest.digest()

    whole = hashlib.sha256(str(size).encode())
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for digest in pool.map(piece, range(0, size, CHUNK)):
            whole.update(digest)
    return whole.hexdigest()


def _remember(note: Path, value: object) -> None:
    part = note.with_name(f"{note.name}.{os.getpid()}.part")
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(note)
