"""What `goodput` knows: how long things take, and how far drafts get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from foretell.core.feedback import Verdict
from foretell.core.tree import TokenTree


class Line:
    """Seconds = a + b x with a, b >= 0, by least squares over fading observations.

    Where x never moved a and b cannot be told apart; they are taken as equal then.
    """

    KEEP = 0.97  # what is left of an observation after every further one
    RIDGE = 0.02
    SURPRISE = 4.0  # an observation counts for at most so many times what was expected

    def __init__(self) -> None:
        self.n = self.sx = self.sy = self.sxx = self.sxy = 0.0
        self.a = self.b = 0.0

    @property
    def known(self) -> bool:
        return self.n > 0

    @property
    def spread(self) -> float:
        """Variance of x."""
        return self.sxx / self.n - (self.sx / self.n) ** 2

    def at(self, x: float) -> float:
        return self.a + self.b * x

    def observe(self, x: float, y: float) -> None:
        if self.n > 2:
            y = min(y, self.SURPRISE * max(self.at(x), 1e-9))
        k = self.KEEP
        self.n, self.sx, self.sy = k * self.n + 1, k * self.sx + x, k * self.sy + y
        self.sxx, self.sxy = k * self.sxx + x * x, k * self.sxy + x * y
        pull = self.RIDGE * self.n  # towards a = b
        n, sxx, sx = self.n + pull, self.sxx + pull, self.sx - pull
        det = n * sxx - sx * sx
        self.a = (self.sy * sxx - sx * self.sxy) / det
        self.b = (n * self.sxy - sx * self.sy) / det
        if self.b < 0:
            self.a, self.b = self.sy / self.n, 0.0
        elif self.a < 0:
            self.a, self.b = 0.0, self.sxy / self.sxx


class Written:
    """A `CostModel` of forwards of 1, 2, 4, 8, .. rows as the user wrote them, in any unit;
    straight lines between, and on along the last one."""

    def __init__(self, costs: Sequence[float]) -> None:
        self.rows, self.costs = [float(1 << i) for i in range(len(costs))], list(costs)

    def seconds(self, rows: int, context: int = 0, sequences: int = 1) -> float:
        if rows > self.rows[-1] and len(self.rows) > 1:
            slope = (self.costs[-1] - self.costs[-2]) / (self.rows[-1] - self.rows[-2])
            return self.costs[-1] + max(0.0, slope) * (rows - self.rows[-1])
        return float(np.interp(rows, self.rows, self.costs))

    def observe(self, rows: int, context: int, sequences: int, seconds: float) -> None:
        """What the user says holds."""


class Habits:
    """How far drafts of up to `most` levels get, over all sequences that are drawn alike.

    Three things are counted, level by level, old observations fading: whether a level that was
    asked for was drafted at all, how many nodes it had, and whether a node of it was accepted once
    the level before it had been.
    """

    KEEP, WEIGHT = 0.99, 4.0
    LEVEL = 16.0  # observations that the mean over levels is worth to each of them
    PRIOR = 0.7  # acceptance, until there are verdicts
    DOUBT = 0.5  # standard deviations: what was seldom tried may be better than it looked

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked, self.got, self.tried, self.won = (self._zeros() for _ in range(4))
        """Weight of drafts with exactly so many levels asked for, drafted, judged, accepted."""
        self.more = self._zeros()  # nodes of a level beyond the first
        self.weight = 1.0  # of the next draft: it grows, and so the old ones fade
        self.total = 0  # verdicts on drafts, ever
        self._typical: Typical | None = None  # since the last verdict

    def _zeros(self) -> list[float]:
        return [0.0] * (self.most + 1)

    def observe(self, asked: int, widths: Sequence[int], verdict: Verdict) -> None:
        """widths: nodes of each drafted level; asked: levels there could have been."""
        most, w = self.most, self.weight
        deep = min(len(widths), most)
        # where a draft ended, deeper levels say nothing
        self.asked[min(asked, deep + 1, most)] += w
        self.got[deep] += w
        self.tried[min(verdict.checked, most)] += w
        self.won[min(verdict.accepted, most)] += w
        if sum(widths) > len(widths):
            for level in range(deep):
                self.more[level] += w * (widths[level] - 1)
        self.total += verdict.checked
        self._typical = None
        self.weight = w / self.KEEP
        if self.weight > 1e9:
            for counts in (self.asked, self.got, self.tried, self.won, self.more):
                counts[:] = [x / self.weight for x in counts]
            self.weight = 1.0

    def read(self) -> Typical:
        if self._typical is None:
            self._typical = self._read()
        return self._typical

    def _read(self) -> Typical:
        exact = np.array([self.asked, self.got, self.tried, self.won]) * (self.KEEP / self.weight)
        asked, got, tried, won = exact[:, :0:-1].cumsum(1)[:, ::-1]
        more = np.array(self.more[:-1]) * (self.KEEP / self.weight)
        all_tried, all_won = float(tried.sum()), float(won.sum())
        mean = (all_won + self.WEIGHT * self.PRIOR) / (all_tried + self.WEIGHT)
        prior = self.LEVEL * mean
        return Typical(
            mean,
            min(1.0, mean + self.DOUBT * (mean * (1 - mean) / (self.total + 1)) ** 0.5),
            (won + prior) / (tried * (all_won / max(all_tried, 1e-9)) + prior),
            (got + 1) / (asked + 1),
            np.maximum(1.0, (got + more + 1) / (got + 1)),
        )


class Typical(NamedTuple):
    """What `Habits` come to; arrays are by level."""

    mean: float  # acceptance over all levels
    hope: float  # it, and what it may be short of the truth as long as little was tried
    shape: np.ndarray  # how each level's acceptance compares with the mean
    there: np.ndarray  # P(drafted | asked for, the level above was drafted)
    widths: np.ndarray  # nodes of a drafted level


@dataclass(slots=True)
class Record:
    """What is known of one sequence; it leans on the habits of all."""

    habits: Habits
    tried: float = 0.0
    won: float = 0.0
    total: int = 0  # verdicts on its drafts, ever
    asks: float = 0.0
    found: float = 0.0
    tokens: int = 0  # levels it is given now
    last: int = 0  # the step in which it last drafted
    drafted: bool = False  # at least once
    met: bool = False  # levels were chosen for it

    KEEP = 0.96
    WEIGHT = 10.0  # observations of its own that the habits are worth
    HOPE = 0.5  # standard deviations: a text that was tried seldom may be better than it looked;
    # less in company, where others show what is to be had

    def observe(self, asked: int, deep: int, verdict: Verdict) -> None:
        k = self.KEEP
        self.asks, self.found = k * self.asks + 1, k * self.found + (deep > 0)
        if verdict.checked:
            self.total += verdict.checked
            self.tried = k * self.tried + verdict.checked
            self.won = k * self.won + verdict.accepted

    def curve(self, most: int) -> tuple[np.ndarray, np.ndarray, float]:
        """For levels 1..most what each is expected to add: emitted tokens and forward rows; and
        how often anything is drafted."""
        gain, rows, found = curves([self], most)
        return gain[0], rows[0], float(found[0])


def curves(
    records: Sequence[Record], most: int, hope: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Record.curve` of B sequences at once: gain [B, most], rows [B, most], found [B]. hope:
    whether what was seldom tried counts as better than it looked."""
    w = Record.WEIGHT
    numbers = np.array([(r.tried, r.won, r.total, r.asks, r.found) for r in records])
    tried, won, total, asks, found = numbers.T
    gain, rows = np.empty((len(records), most)), np.empty((len(records), most))
    for habits in {id(r.habits): r.habits for r in records}.values():
        mine = np.array([r.habits is habits for r in records])
        usual = habits.read()
        seen = (found[mine] + w * usual.there[0]) / (asks[mine] + w)
        own = (won[mine] + w * (usual.hope if hope else usual.mean)) / (tried[mine] + w)
        if hope:
            own += Record.HOPE * np.sqrt(own * (1 - own) / (total[mine] + w) / mine.sum())
        rates = np.minimum(own[:, None] * usual.shape[:most], 0.995)
        there = usual.there[:most].copy()
        there[0] = 1.0
        exist = seen[:, None] * there.cumprod()
        gain[mine], rows[mine] = exist * rates.cumprod(1), exist * usual.widths[:most]
        found[mine] = seen
    return gain, rows, found


def widths(tree: TokenTree) -> list[int]:
    """Nodes of each drafted level, those that cost a row."""
    n = len(tree) - tree.n_context
    if not n:
        return []
    if tree.depth[-1] - tree.depth[tree.tip] == n and len(tree.live) == len(tree):
        return [1] * n  # a chain
    levels = tree.depth[tree.live] - tree.depth[tree.tip]
    return np.bincount(levels[levels > 0]).tolist()[1:]
