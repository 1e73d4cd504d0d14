"""Where a draft ends, in numbers instead of a function, so that kernels can tell without asking."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


def chances(edges: Sequence[float], rates: Sequence[float], scores: Sequence[float]) -> list[float]:
    """That the first 1, 2, .. tokens with these scores, one behind the other, are all accepted;
    falling. rates [E + 1]: of acceptance, for scores below, between and from the edges [E] on."""
    return list(accumulate((rates[bisect_right(edges, s)] for s in scores), mul))


@dataclass(slots=True)
class PathStop:
    """A `Budget.stop` that ends a draft where the chance of its path falls below least[n - 1]
    behind its n-th token; deeper than `least` [K] it never does. edges, rates: as in `chances`."""

    edges: Sequence[float]
    rates: Sequence[float]
    least: Sequence[float]
    said: bool = False  # it has ended a draft

    def __call__(self, scores: Sequence[float]) -> bool:
        level = len(scores)
        if level <= len(self.least):
            path = chances(self.edges, self.rates, scores)
            self.said = path[-1] < self.least[level - 1]
        return self.said
