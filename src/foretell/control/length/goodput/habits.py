"""How far drafts get, over all sequences that are drawn alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from foretell.control.length.goodput.doubt import Doubt
from foretell.core.feedback import Verdict
from foretell.core.tree import TokenTree


class Habits:
    """How far drafts of up to `most` levels get, over all sequences that are drawn alike.

    Counted are, level by level, old observations fading: whether a level that was asked for was
    drafted at all, and whether it was where the level before it turned out to be right (a drafter
    that ends at a doubt ends drafts that would have failed); how many nodes it had; and whether a
    node of it was accepted once the level before it had been.
    """

    KEEP, WEIGHT = 0.995, 4.0
    LEVEL = 16.0  # observations that the mean over levels is worth to each of them
    PRIOR = 0.7  # acceptance, until there are verdicts
    DOUBT = 0.5  # standard deviations: what was seldom tried may be better than it looked

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked, self.got, self.tried, self.won = (self._zeros() for _ in range(4))
        """Weight of drafts with exactly so many levels asked for, drafted, judged, accepted."""
        self.sought, self.met = self._zeros(), self._zeros()
        """The first two, of levels whose level above was accepted."""
        self.doubt = Doubt()
        self.more = self._zeros()  # nodes of a level beyond the first
        self.weight = 1.0  # of the next draft: it grows, and so the old ones fade
        self.total = 0  # verdicts on drafts, ever
        self.levels: int | None = None  # that such a sequence was last given
        self._typical: Typical | None = None  # since the last verdict

    def _counts(self) -> tuple[list[float], ...]:
        judged = (self.asked, self.got, self.sought, self.met, self.tried, self.won)
        return (*judged, self.more)

    def _zeros(self) -> list[float]:
        return [0.0] * (self.most + 1)

    def observe(self, asked: int, widths: Sequence[int], verdict: Verdict) -> None:
        """widths: nodes of each drafted level; asked: levels there could have been."""
        most, w = self.most, self.weight
        deep = min(len(widths), most)
        # where a draft ended, deeper levels say nothing
        self.asked[min(asked, deep + 1, most)] += w
        self.got[deep] += w
        self.sought[min(asked, verdict.accepted + 1, most)] += w
        self.met[min(deep, verdict.accepted + 1)] += w
        self.tried[min(verdict.checked, most)] += w
        self.won[min(verdict.accepted, most)] += w
        if sum(widths) > len(widths):
            for level in range(deep):
                self.more[level] += w * (widths[level] - 1)
        self.total += verdict.checked
        self._typical = None
        self.weight = w / self.KEEP
        if self.weight > 1e9:
            for counts in self._counts():
                counts[:] = [x / self.weight for x in counts]
            self.weight = 1.0

    def read(self) -> Typical:
        if self._typical is None:
            self._typical = self._read()
        return self._typical

    def _read(self) -> Typical:
        exact = np.array(self._counts()[:-1]) * (self.KEEP / self.weight)
        asked, got, sought, met, tried, won = exact[:, :0:-1].cumsum(1)[:, ::-1]
        more = np.array(self.more[:-1]) * (self.KEEP / self.weight)
        all_tried, all_won = float(tried.sum()), float(won.sum())
        mean = (all_won + self.WEIGHT * self.PRIOR) / (all_tried + self.WEIGHT)
        prior = self.LEVEL * mean
        return Typical(
            mean,
            min(1.0, mean + self.DOUBT * (mean * (1 - mean) / (self.total + 1)) ** 0.5),
            (won + prior) / (tried * (all_won / max(all_tried, 1e-9)) + prior),
            (got + 1) / (asked + 1),
            (met + 1) / (sought + 1),
            np.maximum(1.0, (got + more + 1) / (got + 1)),
        )


class Typical(NamedTuple):
    """What `Habits` come to; arrays are by level."""

    mean: float  # acceptance over all levels
    hope: float  # it, and what it may be short of the truth as long as little was tried
    shape: np.ndarray  # how each level's acceptance compares with the mean
    there: np.ndarray  # P(drafted | asked for, the level above was drafted)
    right: np.ndarray  # P(drafted | asked for, the level above was accepted)
    widths: np.ndarray  # nodes of a drafted level


def widths(tree: TokenTree) -> list[int]:
    """Nodes of each drafted level, those that cost a row."""
    n = len(tree) - tree.n_context
    if not n:
        return []
    if tree.is_chain and tree.drafted == n:
        return [1] * n
    levels = tree.depth[tree.live] - tree.depth[tree.tip]
    return np.bincount(levels[levels > 0]).tolist()[1:]
