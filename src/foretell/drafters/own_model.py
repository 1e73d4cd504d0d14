"""A model of the drafter's own, with a cache per sequence: how it catches up, and how it grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from foretell.core.batch import PackedBatch, Segment
from foretell.core.protocols import KVCache, TargetModel, Txn
from foretell.core.stop import PathStop
from foretell.drafters.trees.drive import Scratch, chain_segment, grow_level_by_level
from foretell.drafters.trees.shape import Grower

CHUNK = 512  # rows of one catch-up forward


@dataclass(slots=True)
class OwnCache:
    """The drafter's cache of one sequence: rows for `fed`, of which `sure` are known to be
    committed text and the rest may be drafts that were refused."""

    cache: KVCache
    fed: list[int] = field(default_factory=list)
    sure: int = 0

    def catch_up(self, tokens: list[int]) -> list[int]:
        """Forget rows of refused drafts; return the tokens still to be fed (at least one)."""
        k, limit = self.sure, min(len(self.fed), len(tokens) - 1)
        while k < limit and self.fed[k] == tokens[k]:
            k += 1
        self.cache.truncate(k)
        del self.fed[k:]
        self.sure = k
        return tokens[k:]


class OwnModel:
    """A draft model whose logits come in the target's vocabulary."""

    def __init__(self, model: TargetModel, vocab: int) -> None:
        self.model, self.vocab = model, vocab

    def grow_chains(
        self, caches: list[OwnCache], feeds: list[list[int]], growers: Sequence[Grower]
    ) -> int:
        """Growers that never branch. feeds: what `skip_ahead` returned; returns the forwards run.
        Rows of drafted tokens stay in the cache in case they stand."""
        rounds = self._chains(caches, feeds, growers)
        if rounds:
            return rounds

        def forward(frontiers: list[list[int]]) -> Tensor:
            live = [i for i, nodes in enumerate(frontiers) if nodes]
            fed = [
                feeds[i] if frontiers[i][0] < 0 else [growers[i].tokens[frontiers[i][0]]]
                for i in live
            ]
            own = [caches[i].cache for i in live]
            with self.model.open(own) as txn:
                segments = [chain_segment(f, c.n) for f, c in zip(fed, own, strict=True)]
                logits = self.forward(segments, txn)
                txn.commit([range(len(f)) for f in fed])
            for i, f in zip(live, fed, strict=True):
                caches[i].fed += f
            return logits

        return grow_level_by_level(growers, forward)

    def _chains(
        self, caches: list[OwnCache], feeds: list[list[int]], growers: Sequence[Any]
    ) -> int:
        """All of it in one call, where the model can (`core.protocols.Chains`); 0 where not."""
        run = getattr(self.model, "chains", None)
        if run is None or self.model.spec.vocab > self.vocab:
            return 0
        draws = [d for g in growers if hasattr(g, "alone") and (d := g.alone()) is not None]
        if len(draws) < len(growers):
            return 0
        budgets = [g.budget for g in growers]
        seen: list[list[float]] = [[] for _ in growers]

        def ask(b: int, score: float) -> bool:
            seen[b].append(score)
            stop = budgets[b].stop
            return stop is not None and stop(seen[b])

        stops = [b.stop for b in budgets if isinstance(b.stop, PathStop)]
        known = len(stops) == len(budgets) and all(s.edges is stops[0].edges for s in stops)
        own = [c.cache for c in caches]
        levels = [min(b.depth, b.nodes) for b in budgets]
        with self.model.open(own) as txn:
            batch = PackedBatch([chain_segment(f, c.n) for f, c in zip(feeds, own, strict=True)])
            asked = any(b.stop is not None for b in budgets)
            noisy = any(temperature for temperature, _ in draws)
            ends = (stops if known else ask) if asked else None
            chains = run(batch, txn, levels, ends, draws if noisy else None)
            if chains is None:
                return 0
            fed = [[*f, *ids[:-1]] for f, (ids, _) in zip(feeds, chains, strict=True)]
            txn.commit([range(len(f)) for f in fed])
        if known:
            for stop, k, (ids, _) in zip(stops, levels, chains, strict=True):
                stop.said = len(ids) < k
        for cache, rows, grower, chain in zip(caches, fed, growers, chains, strict=True):
            cache.fed += rows
            grower.take(*chain)
        return max(len(ids) for ids, _ in chains)

    def grow_trees(
        self, caches: list[OwnCache], feeds: list[list[int]], growers: Sequence[Grower]
    ) -> int:
        """Any growers, in one transaction, which keeps only the committed text."""
        own = [c.cache for c in caches]
        scratch = Scratch(growers, feeds, [c.n for c in own])
        with self.model.open(own) as txn:
            forwards = grow_level_by_level(
                growers, lambda frontiers: self.forward(scratch.segments(frontiers), txn)
            )
            txn.commit([range(len(f)) for f in feeds])
        for cache, feed in zip(caches, feeds, strict=True):
            cache.fed += feed
        return forwards

    def skip_ahead(self, own: OwnCache, tokens: list[int]) -> list[int]:
        """Feed all but the last chunk of what the cache lacks of `tokens`; return that chunk."""
        feed = own.catch_up(tokens)
        while len(feed) > CHUNK:
            part, feed = feed[:CHUNK], feed[CHUNK:]
            with self.model.open([own.cache]) as txn:
                segment = chain_segment(part, own.cache.n)
                segment.logits = np.empty(0, np.int64)
                self.model.forward(PackedBatch([segment]), txn)
                txn.commit([range(len(part))])
            own.fed += part
        return feed

    def forward(self, segments: list[Segment], txn: Txn) -> Tensor:
        """Logits [R, V] in the target's vocabulary (padding columns dropped or filled)."""
        logits = self.model.forward(PackedBatch(segments), txn).logits
        missing = self.vocab - logits.shape[-1]
        if missing > 0:
            return pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self.vocab] if missing else logits
