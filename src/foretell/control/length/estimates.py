"""What `goodput` knows: how long things take, and how far drafts get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foretell.core.feedback import Verdict
from foretell.core.tree import TokenTree

Seen = tuple[int, Sequence[int], Verdict]  # levels asked for, nodes of each drafted, the verdict


class Line:
    """Seconds = a + b x with a, b >= 0, by least squares over fading observations.

    Where x never moved a and b cannot be told apart. `flat` says which is meant then: everything in
    a (`flat=True`), or everything in b.
    """

    KEEP = 0.97  # what is left of an observation after every further one
    RIDGE = 0.02
    SURPRISE = 3.0  # an observation counts for at most so many times what was expected

    def __init__(self, flat: bool = False) -> None:
        self.flat = flat
        self.n = self.sx = self.sy = self.sxx = self.sxy = 0.0
        self.a = self.b = 0.0

    @property
    def known(self) -> bool:
        return self.n > 0

    def at(self, x: float) -> float:
        return self.a + self.b * x

    def observe(self, x: float, y: float) -> None:
        if self.n > 2:
            y = min(y, self.SURPRISE * max(self.at(x), 1e-9))
        k = self.KEEP
        self.n, self.sx, self.sy = k * self.n + 1, k * self.sx + x, k * self.sy + y
        self.sxx, self.sxy = k * self.sxx + x * x, k * self.sxy + x * y
        n, sxx = self.n * (1 if self.flat else 1 + self.RIDGE), self.sxx
        sxx *= 1 + self.RIDGE if self.flat else 1
        det = n * sxx - self.sx * self.sx
        if det <= 0 or not self.sxx:
            self.a, self.b = self.sy / self.n, 0.0
            return
        self.a = (self.sy * sxx - self.sx * self.sxy) / det
        self.b = (n * self.sxy - self.sx * self.sy) / det
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

    def __init__(self, most: int) -> None:
        self.asked, self.got, self.nodes = np.zeros(most), np.zeros(most), np.zeros(most)
        self.tried, self.won = np.zeros(most), np.zeros(most)

    def observe(self, asked: int, widths: Sequence[int], verdict: Verdict) -> None:
        """widths: nodes of each drafted level; asked: levels there could have been."""
        self.observe_all([(asked, widths, verdict)])

    def observe_all(self, seen: Sequence[Seen]) -> None:
        """The drafts of one step."""
        most = len(self.asked)
        deep = [min(len(w), most) for _, w, _ in seen]
        # where a draft ended, deeper levels say nothing
        asked = [min(k, d + 1, most) for (k, _, _), d in zip(seen, deep, strict=True)]
        fade = self.KEEP ** len(seen)
        got = at_least(deep, most)
        for counts, new in (
            (self.asked, at_least(asked, most)),
            (self.got, got),
            (self.nodes, got),
            (self.tried, at_least([v.checked for *_, v in seen], most)),
            (self.won, at_least([v.accepted for *_, v in seen], most)),
        ):
            counts *= fade
            counts += new
        for (_, w, _), d in zip(seen, deep, strict=True):
            if sum(w[:d]) > d:
                self.nodes[:d] += np.subtract(w[:d], 1)

    @property
    def mean(self) -> float:
        """Acceptance over all levels."""
        return (self.won.sum() + self.WEIGHT * self.PRIOR) / (self.tried.sum() + self.WEIGHT)

    def shape(self) -> np.ndarray:
        """[most] how each level's acceptance compares with the mean."""
        plain = self.won.sum() / max(self.tried.sum(), 1e-9)
        prior = self.LEVEL * self.mean
        return (self.won + prior) / (self.tried * plain + prior)

    def there(self) -> np.ndarray:
        """[most] P(drafted | asked for, the level above was drafted)."""
        return (self.got + 1) / (self.asked + 1)

    def widths(self) -> np.ndarray:
        """[most] nodes of a drafted level."""
        return np.maximum(1.0, (self.nodes + 1) / (self.got + 1))


@dataclass(slots=True)
class Record:
    """What is known of one sequence; it leans on the habits of all."""

    habits: Habits
    tried: float = 0.0
    won: float = 0.0
    asks: float = 0.0
    found: float = 0.0
    tokens: int = 0  # levels it is given now
    idle: int = 0  # steps since it last drafted
    drafted: bool = False  # at least once
    met: bool = False  # levels were chosen for it

    KEEP = 0.96
    WEIGHT = 10.0  # observations of its own that the habits are worth
    HOPE = 0.2  # standard deviations: what nobody has tried often may be better than it looked

    def observe(self, asked: int, deep: int, verdict: Verdict) -> None:
        k = self.KEEP
        self.asks, self.found = k * self.asks + 1, k * self.found + (deep > 0)
        if verdict.checked:
            self.tried = k * self.tried + verdict.checked
            self.won = k * self.won + verdict.accepted

    def curve(self, most: int) -> tuple[np.ndarray, np.ndarray, float]:
        """For levels 1..most what each is expected to add: emitted tokens and forward rows; and
        how often anything is drafted."""
        gain, rows, found = curves([self], most)
        return gain[0], rows[0], float(found[0])


def curves(records: Sequence[Record], most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Record.curve` of B sequences at once: gain [B, most], rows [B, most], found [B]."""
    w = Record.WEIGHT
    numbers = np.array([(r.tried, r.won, r.asks, r.found) for r in records])
    tried, won, asks, found = numbers.T
    gain, rows = np.empty((len(records), most)), np.empty((len(records), most))
    for habits in {id(r.habits): r.habits for r in records}.values():
        mine = np.array([r.habits is habits for r in records])
        there = habits.there()[:most]
        seen = (found[mine] + w * there[0]) / (asks[mine] + w)
        own = (won[mine] + w * habits.mean) / (tried[mine] + w)
        own += Record.HOPE * np.sqrt(own * (1 - own) / (tried[mine] + w))
        rates = np.clip(own[:, None] * habits.shape()[:most], 0.0, 0.995)
        exist = seen[:, None] * np.cumprod(np.concatenate([[1.0], there[1:]]))
        gain[mine], rows[mine] = exist * np.cumprod(rates, 1), exist * habits.widths()[:most]
        found[mine] = seen
    return gain, rows, found


def at_least(numbers: Sequence[int], most: int) -> np.ndarray:
    """[most] how many of `numbers` are at least 1, 2, .. most."""
    counts = np.bincount(np.minimum(numbers, most), minlength=most + 1)
    return counts[:0:-1].cumsum()[::-1]


def widths(tree: TokenTree) -> list[int]:
    """Nodes of each drafted level, those that cost a row."""
    n = len(tree) - tree.n_context
    if not n:
        return []
    if tree.depth[-1] - tree.depth[tree.tip] == n and len(tree.live) == len(tree):
        return [1] * n  # a chain
    levels = tree.depth[tree.live] - tree.depth[tree.tip]
    return np.bincount(levels[levels > 0]).tolist()[1:]
