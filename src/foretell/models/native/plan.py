"""What one forward needs besides weights, worked out once for all layers: where rows are written,
which keys each sequence reads, masks, rotary factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.models.cache.contiguous import ContiguousCache, ContiguousTxn
from foretell.models.native.arch import Arch, Rope
from foretell.models.native.exact import Walk

MERGED = 64  # most query rows a key/value head for which its group is one matrix


class Reads:
    """The keys one sequence reads in the layers of one window."""

    __slots__ = ("causal", "keys", "mask", "values")

    keys: Sequence[Tensor]  # per layer [1, Hkv, S, D]
    values: Sequence[Tensor]
    mask: Tensor | None  # additive [N G, S] (merged) or [N, S]; None = every row sees every key
    causal: bool


class SeqPlan:
    """One sequence of a forward."""

    __slots__ = ("begin", "end", "layers", "merged", "pairs", "reads", "rows", "walk")

    begin: int  # packed rows begin..end
    end: int
    merged: bool  # the group of a key/value head is one matrix
    rows: Sequence[Tensor]  # per layer: where k and v are written [N, 2, Hkv, D]
    pairs: Any  # Sequence[Tensor] | None: the same as complex numbers [N, 2 Hkv, D / 2]
    reads: list[Reads]  # by window; empty where rows are attended one by one
    layers: Sequence[Tensor]  # per layer: the cache [capacity, 2, Hkv, D]
    walk: Walk | None  # how rows are attended one by one


class Plan:
    """One forward of T rows."""

    __slots__ = ("rows", "seqs", "turns")

    rows: int
    seqs: list[SeqPlan]
    turns: list[
        tuple[Tensor, Tensor]
    ]  # by rope: factors of q [T, 1, D/2], of k and v [T, 2 Hkv, D/2]


class Turns:
    """Rotary factors as complex numbers: coordinate pairs of k and q are multiplied with them,
    pairs of v with 1. Tables grow on demand; angles are float32 products, as Hugging Face's."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device, double: bool) -> None:
        self.rope, self.half, self.device = rope, head_dim // 2, device
        self.dtype = torch.complex128 if double else torch.complex64
        self.table = self._factors(torch.arange(0), rope.frequencies() if not rope.varies else None)

    def at(self, positions: Tensor, lengths: np.ndarray | None) -> Tensor:
        """[T, 2, 1, D / 2] for positions [T] (on the host); lengths: the text length that decides
        each row's frequencies, None where they do not vary."""
        if lengths is not None:
            regimes = np.array([self.rope.regime(int(n)) for n in lengths])
            out = torch.empty(len(positions), 2, 1, self.half, dtype=self.dtype, device=self.device)
            for regime in np.unique(regimes):
                rows = torch.from_numpy(np.flatnonzero(regimes == regime))
                factors = self._factors(positions[rows], self.rope.frequencies(int(regime)))
                out[rows.to(self.device)] = factors
            return out
        need = int(positions.max()) + 1 if len(positions) else 0
        if need > len(self.table):
            grown = torch.arange(max(need, 2 * len(self.table), 256))
            self.table = self._factors(grown, self.rope.frequencies())
        return self.table.index_select(0, positions.to(self.device))

    def _factors(self, positions: Tensor, frequencies: Tensor | None) -> Tensor:
        out = torch.ones(len(positions), 2, 1, self.half, dtype=self.dtype)
        if frequencies is not None:
            angles = positions.float()[:, None] * frequencies
            turned = torch.polar(torch.full_like(angles, self.rope.attention), angles)
            out[:, 0, 0, : len(frequencies)] = turned.to(self.dtype)
        return out.to(self.device)


class Planner:
    """Builds plans for one model."""

    def __init__(
        self,
        arch: Arch,
        windows: Sequence[int | None],
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = False,
    ) -> None:
        """exact: attention takes each row on its own (`Walk`)."""
        self.arch, self.windows, self.dtype, self.device = arch, windows, dtype, device
        self.exact = exact
        double = dtype == torch.float64
        self.turns = [Turns(rope, arch.head_dim, device, double) for rope in arch.ropes]

    def plan(self, batch: PackedBatch, txn: ContiguousTxn) -> Plan:
        """Makes room in the caches of `txn` and says where everything lies."""
        if len(batch.segments) != len(txn.caches):
            raise ValueError("one segment a cache, please")
        if not txn.open:
            raise RuntimeError("the transaction is closed")
        plan = Plan()
        plan.rows = batch.rows
        plan.seqs = [
            self._sequence(s, c, at)
            for s, c, at in zip(batch.segments, txn.caches, batch.offsets, strict=False)
        ]
        plan.turns = self._turns(batch, txn) if self.turns else []
        return plan

    def _turns(self, batch: PackedBatch, txn: ContiguousTxn) -> list[tuple[Tensor, Tensor]]:
        segments = batch.segments
        host = np.concatenate([s.positions for s in segments])
        positions = torch.from_numpy(host)
        lengths = None
        if any(t.rope.varies for t in self.turns):
            # Where frequencies depend on the text's length, a prompt fed in one forward takes those
            # of its length, as in Hugging Face; later rows those of their own position, so that
            # they do not depend on how many rows a step brought.
            lengths = host + 1
            for s, c, at in zip(segments, txn.caches, batch.offsets, strict=False):
                if c.used == 0 and len(s):
                    lengths[at : at + len(s)] = s.positions.max() + 1
        found = []
        for t in self.turns:
            factors = t.at(positions, lengths if t.rope.varies else None)
            wide = factors.expand(-1, -1, self.arch.kv_heads, -1).flatten(1, 2)
            found.append((factors[:, 0], wide))
        return found

    def _sequence(self, segment: Segment, cache: ContiguousCache, at: int) -> SeqPlan:
        n, used = len(segment), cache.used
        cache.ensure(used + n)
        plan = SeqPlan()
        plan.begin, plan.end = at, at + n
        plan.merged = n * self.arch.groups <= MERGED or n == 1
        plan.rows = cache.kv[:, used : used + n].unbind(0)
        plan.pairs = None
        if cache.pairs is not None:
            plan.pairs = cache.pairs[:, used : used + n].flatten(2, 3).unbind(0)
        plan.layers, plan.walk, plan.reads = cache.kv.unbind(0), None, []
        if self.exact:
            self._check_ancestors(segment, cache)
            plan.walk = Walk(segment, cache, self.windows)
        else:
            plan.reads = [self._reads(segment, cache, plan.merged, w) for w in self.windows]
        return plan

    def _check_ancestors(self, segment: Segment, cache: ContiguousCache) -> None:
        n, width = len(segment), cache.used - cache.n + len(segment)
        if segment.ancestors is not None and segment.ancestors.shape != (n, width):
            raise ValueError(f"ancestors are {segment.ancestors.shape}, the rows want {(n, width)}")

    def _reads(
        self, segment: Segment, cache: ContiguousCache, merged: bool, window: int | None
    ) -> Reads:
        n, used, committed = len(segment), cache.used, cache.n
        low = 0
        if window is not None and n:  # committed rows that no query sees any more are not read
            oldest = int(segment.positions.min()) - window
            low = int(np.searchsorted(cache.positions[:committed], oldest, side="right"))
        reads = Reads()
        kv = cache.kv[:, None, low : used + n].transpose(2, 4)  # [L, 1, Hkv, 2, S, D]
        reads.keys = kv[:, :, :, 0].unbind(0)
        reads.values = kv[:, :, :, 1].unbind(0)
        reads.mask, reads.causal = None, False
        hidden = self._hidden(segment, cache, low, window)
        if hidden is not None:
            if not merged and low == used == 0 and segment.ancestors is None and window is None:
                reads.causal = True
            else:
                reads.mask = self._mask(hidden, used + n - low, merged)
        return reads

    def _hidden(
        self, segment: Segment, cache: ContiguousCache, low: int, window: int | None
    ) -> np.ndarray | None:
        """[N, k] bool: which of the last k keys each row must not see; None = it sees all."""
        n, used, committed = len(segment), cache.used, cache.n
        width = used - committed + n
        if segment.ancestors is not None:
            self._check_ancestors(segment, cache)
            hidden = ~segment.ancestors
        elif n <= 1:
            hidden = np.zeros((n, width), bool)
        else:
            hidden = ~np.tri(n, width, width - n, dtype=bool)
        if window is not None and n:
            own = np.concatenate([cache.positions[committed:used], segment.positions])
            keys = np.concatenate([cache.positions[low:committed], own])
            far = segment.positions[:, None] - keys >= window
            if far[:, : committed - low].any():
                far[:, committed - low :] |= hidden
                return far
            hidden = hidden | far[:, committed - low :]
        return hidden if hidden.any() else None

    def _mask(self, hidden: np.ndarray, keys: int, merged: bool) -> Tensor:
        """Additive mask over `keys` keys; all but the last hidden.shape[1] are visible."""
        n, k = hidden.shape
        groups = self.arch.groups if merged else 1
        mask = np.zeros((n, groups, keys), np.float32)
        mask[:, :, keys - k :][np.broadcast_to(hidden[:, None], (n, groups, k))] = -np.inf
        return torch.from_numpy(mask.reshape(n * groups, keys)).to(self.device, self.dtype)
