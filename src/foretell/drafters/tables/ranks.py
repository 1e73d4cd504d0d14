"""Trees whose shape is known before their tokens: a node is the string of ranks on its path.

Rank r below a node is its r-th best (or r-th drawn) child. With p[r] the chance that the child of
rank r is the one that stands, a node stands with the product of p along its path, a tree emits one
token more than the sum of that over its nodes, and the best tree of n nodes is the n largest.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from foretell.core.protocols import CostModel

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RankTree:
    """Nodes level by level, siblings by rank; arrays are [n] int64."""

    parent: np.ndarray  # -1 = the tip
    rank: np.ndarray
    level: np.ndarray  # 1 for the tip's children
    bounds: tuple[tuple[int, int], ...]  # nodes of each level
    steps: tuple[tuple[int, int], ...]  # (parent, rank) of each node, as plain numbers

    def __len__(self) -> int:
        return len(self.parent)

    @classmethod
    def of(cls, paths: Iterable[Path]) -> RankTree:
        """From the paths of its nodes; with a node come its parent and its elder siblings."""
        ordered = sorted(paths, key=lambda path: (len(path), path))
        index = {(): -1, **{path: i for i, path in enumerate(ordered)}}
        levels = np.array([len(path) for path in ordered], np.int64)
        ends = np.searchsorted(levels, np.arange(1, (levels[-1] if len(levels) else 0) + 2))
        steps = tuple((index[path[:-1]], path[-1]) for path in ordered)
        return cls(
            np.array([parent for parent, _ in steps], np.int64),
            np.array([rank for _, rank in steps], np.int64),
            levels,
            tuple((int(a), int(b)) for a, b in pairwise(ends)),
            steps,
        )


def best_paths(
    p: Sequence[float], nodes: int, depth: int, branching: int = 1 << 30
) -> list[tuple[float, Path]]:
    """(chance, path) of the `nodes` likeliest nodes, likeliest first.

    p[r] must not increase with r: elder siblings then come before younger ones and parents before
    children, so that every beginning of the list is a tree.
    """
    width = min(len(p), branching)
    if nodes <= 0 or depth <= 0 or width <= 0:
        return []
    heap: list[tuple[float, int, Path]] = [(-p[0], 1, (0,))]
    found: list[tuple[float, Path]] = []
    while heap and len(found) < nodes:
        chance, level, path = heapq.heappop(heap)
        found.append((-chance, path))
        rank = path[-1]
        if rank + 1 < width and p[rank + 1] > 0:
            sibling = chance / p[rank] * p[rank + 1]
            heapq.heappush(heap, (sibling, level, (*path[:-1], rank + 1)))
        if level < depth:
            heapq.heappush(heap, (chance * p[0], level + 1, (*path, 0)))
    return found


def best_size(
    chances: Sequence[float], cost: CostModel, context: int = 0, sequences: int = 1
) -> int:
    """How many of the likeliest nodes to draft so that tokens per second are most.

    chances: of the nodes, largest first; every one of `sequences` sequences drafts as many.
    """
    sizes = sorted({n for n in (*range(9), *_SIZES, len(chances)) if n <= len(chances)})
    gain = np.concatenate([[1.0], 1.0 + np.cumsum(chances)])

    def rate(n: int) -> float:
        return float(gain[n]) / cost.seconds(sequences * (n + 1), context, sequences)

    return max(sizes, key=rate)


_SIZES = (10, 12, 15, 19, 23, 27, 31, 39, 47, 55, 63, 71, 80, 95, 111, 127)


class RankStats:
    """How often a candidate of rank r was the token that came: p[r], with a prior.

    Old steps fade (half of the weight after 0.7 `memory` tokens). A few numbers, whatever it has
    seen.
    """

    __slots__ = ("hits", "keep", "prior", "tries", "weight")

    def __init__(self, prior: Sequence[float], weight: float = 30.0, memory: float = 400.0) -> None:
        self.prior, self.weight, self.keep = np.asarray(prior, float), weight, 1 - 1 / memory
        self.hits, self.tries = [0.0] * len(prior), [0.0] * len(prior)  # lists: so few are quicker

    def saw(self, rank: int, width: int | None = None) -> None:
        """One token came; there were candidates of the ranks below `width` (None: of all), and it
        was that of `rank`, or none of them where rank is no smaller."""
        width = len(self.hits) if width is None else min(width, len(self.hits))
        keep = self.keep
        self.hits = [hits * keep for hits in self.hits]
        self.tries = [tries * keep + (r < width) for r, tries in enumerate(self.tries)]
        if rank < width:
            self.hits[rank] += 1

    def chances(self) -> np.ndarray:
        """p [K], made non-increasing."""
        hits, tries = np.array(self.hits), np.array(self.tries)
        p = (hits + self.weight * self.prior) / (tries + self.weight)
        return np.minimum.accumulate(p)


def _strings(text: str) -> tuple[Path, ...]:
    return tuple(tuple(int(c) for c in word) for word in text.split())


PAPER = _strings(
    "0 1 2 3 4 5 6 7 "
    "00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70 "
    "000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 "
    "100 101 110 200 300 400 500 "
    "0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000 "
    "00000 00001 00002 00010 00020 00100 01000 10000 "
    "000000 000001 000100"
)
"""The 80 nodes of Token Recycling's published tree (levels of 8, 21, 25, 15, 8 and 3)."""


@lru_cache(maxsize=256)
def paper_tree(p: tuple[float, ...], nodes: int, depth: int, branching: int) -> RankTree:
    """The published tree, cut to a budget: nodes within depth and branching, likeliest first."""
    fits = [s for s in PAPER if len(s) <= depth and max(s) < min(branching, len(p))]
    chance = {s: float(np.prod([p[r] for r in s])) for s in fits}
    fits.sort(key=lambda s: (-chance[s], len(s), s))
    return RankTree.of(fits[: max(0, nodes)])


@lru_cache(maxsize=256)
def tree_of(paths: tuple[Path, ...]) -> RankTree:
    """`RankTree.of`, remembered."""
    return RankTree.of(paths)
