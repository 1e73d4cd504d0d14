"""Straight lines through fading observations of what things take."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from foretell.core.costs import row_range

SURPRISE = 2.0  # an observation counts for at most so many times what was expected
EARLY = 8  # observations of which the median is what is expected


class Early:
    """The first observations of something: which of them were accidents shows only later."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []  # x, y, y over what x makes of it

    def add(self, x: float, y: float, size: float) -> list[tuple[float, float]]:
        """All so far, none of them more than `SURPRISE` times as large as is usual."""
        self.seen.append((x, y, y / size))
        usual = SURPRISE * median(s for _, _, s in self.seen)
        return [(x, min(y, usual * y / s) if s > 0 else y) for x, y, s in self.seen]


class Line:
    """Seconds = a + b x with a, b >= 0, by least squares over fading observations.

    Where x never moved a and b cannot be told apart; they are taken as equal then.
    """

    KEEP = 0.97  # what is left of an observation after every further one
    RIDGE = 0.02

    def __init__(self) -> None:
        self.a = self.b = 0.0
        self.early = Early()
        self._clear()

    def _clear(self) -> None:
        self.n = self.sx = self.sy = self.sxx = self.sxy = 0.0

    @property
    def spread(self) -> float:
        """Variance of x."""
        return self.sxx / self.n - (self.sx / self.n) ** 2

    def at(self, x: float) -> float:
        return self.a + self.b * x

    def observe(self, x: float, y: float) -> None:
        if len(self.early.seen) < EARLY:
            self._clear()
            for earlier in self.early.add(x, y, 1.0 + x):
                self._add(*earlier)
        else:
            self._add(x, min(y, SURPRISE * max(self.at(x), 1e-9)))

    def _add(self, x: float, y: float) -> None:
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


class Tilt:
    """actual / predicted = c + d (x - mean x), over fading observations.

    Means, not medians: what a busy machine adds to some steps is part of what steps take.
    A prediction that is wrong by a factor is mended at once. The slope comes from how far each
    observation was from the few before it, or else a machine that grows quicker or slower while
    x changes would be taken for one; it is believed as far as x varied, and slowly forgotten where
    x stands still.
    """

    KEEP = 0.97  # what is left of an observation after every further one
    SLOPE = 0.998  # the same of what it says of the slope
    FEW = 0.7  # what is left of an observation in the mean of the few before
    RIDGE = 2.0  # how much x must vary before half of a slope is believed
    STEEPEST = 1.0
    LEAST = 0.05

    def __init__(self) -> None:
        self.early = Early()
        self._clear()

    def _clear(self) -> None:
        self.n = self.x = self.c = self.d = self.sxx = self.sxr = 0.0
        self.few_x = self.few_r = 0.0  # lately

    def at(self, x: Any) -> Any:
        found = self.c + self.d * (x - self.x)
        return max(self.LEAST, found) if isinstance(found, float) else np.maximum(self.LEAST, found)

    def observe(self, x: float, r: float) -> None:
        if len(self.early.seen) < EARLY:
            self._clear()
            for earlier in self.early.add(x, r, 1.0):
                self._add(*earlier)
        else:
            self._add(x, min(r, SURPRISE * self.at(x)))

    def _add(self, x: float, r: float) -> None:
        if not self.n:
            self.few_x, self.few_r = x, r
        dx, dr = x - self.few_x, r - self.few_r
        self.sxx = self.SLOPE * self.sxx + dx * dx
        self.sxr = self.SLOPE * self.sxr + dx * dr
        self.few_x, self.few_r = x - self.FEW * dx, r - self.FEW * dr
        self.n = self.KEEP * self.n + 1
        self.x += (x - self.x) / self.n
        self.c += (r - self.c) / self.n
        slope = self.sxr / (self.sxx + self.RIDGE)
        self.d = min(max(slope, -self.STEEPEST), self.STEEPEST)


class Stairs:
    """What forwards of 1, 2, 3, .. rows take over what is expected: where one row more needs
    another pass over the weights a forward takes a step up, which a curve through some of its
    points misses, and so does one that was measured in a busy moment. Means of fading
    observations, shrunk to 1."""

    KEEP = 0.995  # what is left of an observation after every further one of the same rows
    RIDGE = 16.0  # observations that the expectation is worth

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float]] = {}  # observations, and what is over 1 of all

    def at(self, rows: int) -> float:
        n, over = self.seen.get(row_range(rows, 4), (0.0, 0.0))
        return 1.0 + over / (n + self.RIDGE)

    def observe(self, rows: int, ratio: float) -> None:
        i = row_range(rows, 4)
        n, over = self.seen.get(i, (0.0, 0.0))
        over = self.KEEP * over + min(ratio, SURPRISE) - 1.0
        self.seen[i] = self.KEEP * n + 1.0, over
