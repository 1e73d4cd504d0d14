"""Caches and transactions of the transformers adapter. Knows no transformers: what differs between
models is behind the store that `HFModel` hands over.

Two stores exist. `RowStore` keeps key/value rows that can be cut and picked; `StateStore` keeps
whatever a recurrent model carries along, which only moves forward.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from foretell.core.errors import NoRollback


class RowStore:
    """A `DynamicCache` whose layers hold keys and values [1, heads, rows, head size]."""

    rolls_back = True

    def __init__(self, make: Any) -> None:
        """make() returns an empty `DynamicCache`."""
        self._make = make
        self.kv = make()

    @property
    def rows(self) -> int:
        return int(self.kv.get_seq_length())

    def keep(self, n: int) -> None:
        """Keep the first n rows."""
        if n == 0:
            self.kv = self._make()
        elif n < self.rows:
            self.kv.crop(n - self.rows)  # the rows to drop: transformers 5 takes no length

    @torch.inference_mode()
    def pick(self, start: int, path: Sequence[int]) -> None:
        """Keep rows 0..start-1 and start + path, in that order."""
        n = start + len(path)
        if list(path) != list(range(len(path))):
            for layer in self.kv.layers:
                rows = torch.tensor(path, device=layer.keys.device) + start
                for name in ("keys", "values"):
                    table = getattr(layer, name)
                    # Rows move only towards the front, and index_select copies before they land.
                    table[..., start:n, :] = table.index_select(-2, rows)
        self.keep(n)

    def copy_from(self, other: RowStore, n: int) -> None:
        if n:
            for i, layer in enumerate(other.kv.layers):
                k, v = layer.keys[..., :n, :].clone(), layer.values[..., :n, :].clone()
                self.kv.update(k, v, i)


class StateStore:
    """What a recurrent or hybrid model passes from step to step (an opaque object)."""

    rolls_back = False

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.carry: dict[str, Any] = {}

    @property
    def rows(self) -> int:
        return len(self.ids)

    def keep(self, n: int) -> None:
        if n == 0:
            self.ids, self.carry = [], {}
        elif n < self.rows:
            raise NoRollback("This model's recurrent state cannot forget tokens it has read.")

    def pick(self, start: int, path: Sequence[int]) -> None:
        if list(path) != list(range(self.rows - start)):
            raise NoRollback(
                "This model's recurrent state cannot drop some of the tokens it has read; "
                "decode it without drafts."
            )

    def copy_from(self, other: StateStore, n: int) -> None:
        if n not in (0, other.rows):
            raise NoRollback("Only the whole state of a recurrent model can be copied.")
        if n:
            self.ids, self.carry = list(other.ids), copy.deepcopy(other.carry)


class HFCache:
    """The cache of one sequence (KVCache protocol)."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.n = 0
        self.busy = False  # a transaction is open
        self.lost = False  # recurrent: rows were read that nobody committed

    def reserve(self, rows: int) -> None:
        """Nothing to do: the cache grows by itself."""

    def _ready(self) -> None:
        if self.busy:
            raise RuntimeError("a transaction is open on this cache")
        if self.lost:
            raise NoRollback(
                "A step of this recurrent model was broken off, so its state is gone; "
                "start the sequence again."
            )

    def truncate(self, n: int) -> None:
        """Forget rows n... Raises NoRollback for a recurrent model, unless n is 0 or all."""
        if n == 0 and not self.busy:
            self.lost = False
        self._ready()
        if not 0 <= n <= self.n:
            raise ValueError(f"cannot keep {n} of {self.n} rows")
        self.store.keep(n)
        self.n = n

    def copy_prefix(self, other: Any, n: int) -> None:
        """Become a copy of the first n rows of `other`; self must be empty. Raises NoRollback
        where a recurrent model would have to forget."""
        self._ready()
        other._ready()
        if self.n or not 0 <= n <= other.n:
            raise ValueError(f"cannot copy {n} of {other.n} rows into a cache of {self.n}")
        self.store.copy_from(other.store, n)
        self.n = n

    def check(self) -> None:
        assert self.n >= 0
        assert self.busy or self.lost or self.store.rows == self.n, (self.store.rows, self.n)


class HFTxn:
    """Scratch rows over some caches (Txn protocol)."""

    def __init__(self, caches: Sequence[HFCache]) -> None:
        for c in caches:
            c._ready()
        if len({id(c) for c in caches}) != len(caches):
            raise ValueError("a cache appears twice in one transaction")
        self.caches = list(caches)
        self.scratch = [0] * len(caches)
        self.open = True
        for c in caches:
            c.busy = True

    def __enter__(self) -> HFTxn:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        if not self.open:
            return
        self._close()
        stuck = False
        for c in self.caches:
            if c.store.rolls_back or c.n == 0 or c.store.rows == c.n:
                c.store.keep(c.n)
            else:
                c.lost = stuck = True
        if stuck and kind is None:
            raise NoRollback("This model's recurrent state cannot undo the step it has made.")

    def _close(self) -> None:
        self.open = False
        for c in self.caches:
            c.busy = False

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the scratch rows `paths[b]` of each cache, in path order, and drop the rest.

        Raises NoRollback, changing nothing, when a recurrent model would have to drop a row.
        """
        if not self.open:
            raise RuntimeError("the transaction is closed")
        kept = [[int(i) for i in p] for p in paths]
        if len(kept) != len(self.caches):
            raise ValueError(f"{len(kept)} paths for {len(self.caches)} caches")
        for path, s, c in zip(kept, self.scratch, self.caches, strict=True):
            rising = all(a < b for a, b in pairwise(path))
            if not rising or (path and not 0 <= path[0] <= path[-1] < s):
                raise ValueError(f"{path} is no rising path through {s} rows")
            if not c.store.rolls_back:
                c.store.pick(c.n, path)  # a check: nothing moves
        for path, c in zip(kept, self.caches, strict=True):
            if c.store.rolls_back:
                c.store.pick(c.n, path)
            c.n += len(path)
        self._close()


def additive_mask(
    committed: int, ancestors: Any, rows: int, earlier: int, dtype: torch.dtype, device: Any
) -> Tensor:
    """[1, 1, rows, committed + earlier + rows]: 0 where a row may look, else the lowest number.

    ancestors: [rows, earlier + rows] bool, None = a chain.
    """
    width = committed + earlier + rows
    if ancestors is None:
        seen = torch.ones(rows, width, dtype=torch.bool).tril(committed + earlier)
    else:
        seen = torch.ones(rows, width, dtype=torch.bool)
        seen[:, committed:] = torch.from_numpy(ancestors)
    mask = torch.zeros(rows, width, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[None, None].to(device)
