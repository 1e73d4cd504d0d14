"""The plain KV cache: one block of memory a sequence, rows in path order, and its transaction.

Layout [L, capacity, 2, Hkv, D]: a row holds its keys and values of all heads side by side, so one
strided operation rotates and writes both, and the attention kernels read [Hkv, rows, D] views.
Layers with a sliding window keep all rows, too: a rollback or a branch may need them, and the
window is applied by position when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import PackedBatch

SMALLEST = 64  # rows of the first allocation


class ContiguousCache:
    """The key/value rows of one sequence.

    ``kv`` [L, capacity, 2, Hkv, D]; ``pairs`` is the same memory as complex numbers
    [L, capacity, 2, Hkv, D / 2] (None where the dtype has no complex twin). Rows ``n..used`` belong
    to the open transaction.
    """

    __slots__ = ("kv", "n", "pairs", "positions", "txn", "used")

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        rows: int = 0,
    ) -> None:
        """shape: (layers, key/value heads, head size); rows: how many to make room for."""
        layers, heads, size = shape
        self.n = self.used = 0
        self.txn: ContiguousTxn | None = None
        self.positions = np.empty(0, np.int64)  # [capacity] absolute position of each row
        with torch.inference_mode():
            self.kv = torch.empty(layers, 0, 2, heads, size, dtype=dtype, device=device)
        self.pairs: Tensor | None = None
        if rows:
            self.reserve(rows)

    @property
    def capacity(self) -> int:
        return self.kv.shape[1]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all. Untouched pages cost no memory on a CPU."""
        if rows <= self.capacity:
            return
        layers, _, _, heads, size = self.kv.shape
        with torch.inference_mode():
            kv = self.kv.new_empty(layers, rows, 2, heads, size)
            kv[:, : self.used].copy_(self.kv[:, : self.used])
            self.kv, self.pairs = kv, None
            if kv.dtype in (torch.float32, torch.float64) and size % 2 == 0:
                self.pairs = torch.view_as_complex(kv.view(layers, rows, 2, heads, size // 2, 2))
        positions = np.empty(rows, np.int64)
        positions[: self.used] = self.positions[: self.used]
        self.positions = positions

    def ensure(self, rows: int) -> None:
        """Like `reserve`, but grows by half at least, so that n appends copy O(n) rows."""
        if rows > self.capacity:
            self.reserve(max(rows, self.capacity * 3 // 2, SMALLEST))

    def truncate(self, n: int) -> None:
        self._idle()
        if not 0 <= n <= self.n:
            raise ValueError(f"cannot truncate {self.n} rows to {n}")
        self.n = self.used = n

    def copy_prefix(self, other: ContiguousCache, n: int) -> None:
        self._idle()
        if self.n or n > other.n:
            raise ValueError("copy_prefix needs an empty cache and rows that exist")
        self.reserve(n)
        with torch.inference_mode():
            self.kv[:, :n].copy_(other.kv[:, :n])
        self.positions[:n] = other.positions[:n]
        self.n = self.used = n

    def check(self) -> None:
        assert self.txn is None, "a transaction is open"
        assert 0 <= self.n <= self.capacity, "more rows than room"
        assert self.used == self.n, "scratch rows outlived their transaction"
        assert len(self.positions) == self.capacity, "positions and rows differ in number"
        assert (np.diff(self.positions[: self.n]) > 0).all(), "positions do not increase"
        assert bool(torch.isfinite(self.kv[:, : self.n]).all()), "a row is not finite"

    def _idle(self) -> None:
        if self.txn is not None:
            raise RuntimeError("the cache has an open transaction")


class ContiguousTxn:
    """Scratch rows behind the committed ones of B caches. Leaving without `commit` drops them."""

    __slots__ = ("caches", "open", "plan", "scratch")

    def __init__(self, caches: Sequence[ContiguousCache]) -> None:
        if len({id(c) for c in caches}) < len(caches):
            raise RuntimeError("a cache appears twice in one transaction")
        for cache in caches:
            cache._idle()
        self.caches = caches
        self.scratch = [0] * len(caches)
        self.open = True
        self.plan: Any = None  # the runner's, for layers run one call after another
        for cache in caches:
            cache.txn = self

    def __enter__(self) -> ContiguousTxn:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def advance(self, batch: PackedBatch) -> None:
        """The rows of `batch` were written behind the scratch rows: count them."""
        for b, segment in enumerate(batch.segments):
            cache, n = self.caches[b], len(segment)
            cache.positions[cache.used : cache.used + n] = segment.positions
            cache.used += n
            self.scratch[b] += n
        self.plan = None

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep scratch rows `paths[b]` of cache b. Rows move only where a path leaves gaps."""
        if not self.open:
            raise RuntimeError("the transaction is closed")
        if len(paths) != len(self.caches):
            raise ValueError("one path a cache, please")
        kept = [list(p) for p in paths]
        straight = [path == list(range(len(path))) for path in kept]
        for path, plain, scratch in zip(kept, straight, self.scratch, strict=True):
            falls = not plain and (path[0] < 0 or any(a >= b for a, b in pairwise(path)))
            if falls or (path and path[-1] >= scratch):
                raise ValueError("a path names increasing scratch rows")
        for cache, path, plain in zip(self.caches, kept, straight, strict=True):
            if not plain:
                _move(cache, np.array(path))
            cache.n += len(path)
        self._close()

    def _close(self) -> None:
        if not self.open:
            return
        self.open = False
        self.plan = None
        for cache in self.caches:
            cache.used = cache.n
            cache.txn = None


@torch.inference_mode()
def _move(cache: ContiguousCache, path: np.ndarray) -> None:
    """Bring scratch rows `path` together behind the committed ones."""
    first, n = cache.n, len(path)
    gap = int(np.flatnonzero(path != np.arange(n))[0])  # rows before it stay put
    source = first + path[gap:]
    rows = torch.from_numpy(source).to(cache.kv.device)
    cache.kv[:, first + gap : first + n] = cache.kv.index_select(1, rows)
    cache.positions[first + gap : first + n] = cache.positions[source]
