"""What forwards cost, where the user says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np


class GivenCosts:
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


def row_range(rows: int, parts: int) -> int:
    """The range of rows whose costs are corrected together: each number up to 16 by itself, since
    many a row more is nearly free and some need another pass over the weights, then so many
    `parts` to the octave."""
    return rows if rows <= 16 else 17 + int(parts * math.log2(rows / 16))


def paying(values: Sequence[float], costs: Sequence[float], rate: float) -> int:
    """How many nodes to draft, likeliest first, for the most tokens per second in the long run: a
    second more in this step has to bring what any second brings. (The best rate of the step alone
    drafts too much where little is likely, and too little where much is.)

    values: chances of the nodes' paths, falling; costs: seconds of a step with 0, 1, .. of them;
    rate: tokens per second, 0 = what a step without them makes of one sequence.
    """
    rate = rate or 1 / costs[0]
    gain = accumulate(values, initial=1.0)
    worth = [g - rate * c for g, c in zip(gain, costs, strict=False)]
    return worth.index(max(worth))
