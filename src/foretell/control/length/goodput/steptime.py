"""What a step takes: the target's forward and verification, and drafting, as they lately were."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from foretell.control.length.goodput.fits import Line, Stairs, Tilt
from foretell.core.protocols import CostModel, Timings

T = TypeVar("T")
SOON = 4.0  # drafted rows a sequence, to the power of e
OFFSETS = (*range(13), 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class StepTime:
    """Seconds of a step by its rows, levels and sequences.

    cost: the target's forwards, as somebody measured them; what really happens tilts it, for each
    range of sequences (1, 2-3, 4-7, ..) by itself, and then for each number of rows (`Stairs`).
    Drafting is kept in units of what forwards took at that moment, since whatever slows the machine
    down slows both. draft: what drafting a level takes, in the unit of `cost`; then nothing is
    learned from the clock.
    """

    PACE = 0.1
    COLD = 3
    SPREAD = 0.03  # variance of levels
    MOST = 30.0  # one prompt counts for so many drafts at most
    WINDOW = 1000  # steps over which arrivals are counted

    def __init__(self, cost: CostModel, draft: float | None = None) -> None:
        self.draft = draft
        self.plain: Callable[..., float] = getattr(cost, "plain", cost.seconds)
        """As it was measured: what is learned here corrects it."""
        self.tilts: dict[int, Tilt] = defaultdict(Tilt)  # by range of sequences
        self.stairs = Stairs()
        self.lines: dict[int, Line] = defaultdict(Line)  # drafting by levels, by range of sequences
        self.reading: float | None = None  # what drafting for a newcomer takes more: its prompt
        self.steps, self.arrived = 1.0, 0.0  # lately
        self.cold = self.COLD  # first drafts that are not counted: they find memory untouched

    @property
    def catching(self) -> float:
        """What a step spends on the prompts of newcomers, where all draft."""
        return (self.reading or 0.0) * self.arrived / self.steps

    def went_by(self, steps: int, arrivals: int) -> None:
        """Steps since this was last told, and the sequences that came with them."""
        self.steps, self.arrived = self.steps + steps, self.arrived + arrivals
        if self.steps > self.WINDOW:
            self.steps, self.arrived = self.steps / 2, self.arrived / 2

    @property
    def known(self) -> bool:
        """Whether it is known how long drafting takes."""
        return self.draft is not None or bool(self.lines)

    def one_sided(self, sequences: int) -> bool:
        """Whether drafts were so much alike that what a level takes cannot be told."""
        line = self.lines.get(sequences.bit_length())
        return self.draft is None and line is not None and line.spread < self.SPREAD

    def forward(self, rows: Sequence[int], context: int, sequences: int) -> np.ndarray:
        """A forward and its verification for each number of rows; rising."""
        plain = [self.plain(n, context, sequences) * self.stairs.at(n) for n in rows]
        if not self.tilts:
            return np.array(plain)
        tilt = nearest(self.tilts, sequences)
        return np.maximum.accumulate(plain * tilt.at(draftlike(np.array(rows), sequences)))

    def expected(
        self, sequences: int, context: int, extra: float, found: float = 1.0
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Seconds of a forward by its expected rows, of which up to `extra` are drafts. found: how
        often there are drafts at all; (1 - found) of the forwards have none."""
        marks = [sequences + k for k in OFFSETS if k < extra]
        marks.append(sequences + max(1, math.ceil(extra)))
        cost = self.forward(marks, context, sequences)

        def seconds(rows: np.ndarray) -> np.ndarray:
            full = np.interp(sequences + (rows - sequences) / found, marks, cost)
            return (1 - found) * cost[0] + found * full

        return seconds

    def drafting(self, levels: Any, sequences: Any) -> Any:
        """Drafting so many levels (a number, or an array of numbers above 0) for so many sequences
        (a number, or with a number of levels an array of them); 0 while nobody knows."""
        if self.draft is not None:
            return self.draft * levels
        if not self.lines or (isinstance(levels, int) and not levels):
            return 0.0
        if not isinstance(sequences, np.ndarray):
            line = nearest(self.lines, sequences)
            return self._speed(sequences) * (line.at(levels) + self.catching)
        known = sorted(self.lines)
        at = np.array([self.lines[b].at(levels) for b in known]) + self.catching
        at *= self._speed(int(sequences[-1]))
        ranges = np.frexp(sequences)[1]  # the number of binary digits
        return at[np.abs(np.array(known)[:, None] - ranges).argmin(0)]

    def _speed(self, sequences: int) -> float:
        """How much longer forwards lately took than the cost model said."""
        return nearest(self.tilts, sequences).c if self.tilts else 1.0

    def observe(
        self,
        timings: Timings,
        levels: int,
        awake: int,
        fresh: int = 0,
        clean: bool = True,
        usual: bool = True,
    ) -> None:
        """levels: of the deepest draft; awake: sequences that were asked to draft; fresh: those
        among them that never had been, so that a draft model had to read their prompts; clean:
        whether none was, nor had slept long; usual: False for a step whose forward found the
        processor's caches full of something else."""
        if self.draft is not None:
            return
        if usual and timings.decoding and timings.rows:
            guess = self.plain(timings.rows, timings.context, timings.sequences)
            took = whole(timings)
            if guess > 0 and took > 0:
                tilt = self.tilts[timings.sequences.bit_length()]
                x, ratio = draftlike(timings.rows, timings.sequences), took / guess
                tilt.observe(x, ratio)
                self.stairs.observe(timings.rows, ratio / tilt.at(x))
        if not awake:
            return
        if self.cold:
            self.cold -= 1
            return
        took = timings.draft / self._speed(timings.sequences)
        if clean:
            self.lines[awake.bit_length()].observe(levels, took)
        elif fresh and (line := self.lines.get(awake.bit_length())) is not None:
            expected = line.at(max(1, levels))
            extra = min(max(0.0, took - expected) / fresh, self.MOST * expected)
            if self.reading is None:
                self.reading = extra
            self.reading += self.PACE * (extra - self.reading)


def whole(timings: Timings) -> float:
    """Seconds of a step but for its drafting. Of what went by between two steps no more counts than
    the step itself took: the rest is somebody's who waited."""
    took = timings.target + timings.verify
    return took + min(timings.other, took)


def draftlike(rows: Any, sequences: int) -> Any:
    """How much of a drafting step it is, 0 to 1. The first drafted rows make most of the
    difference: a draft model has been at the caches, and rows are what the cost model knows."""
    exponent = -SOON * (rows / sequences - 1.0)
    return 1.0 - (math.exp(exponent) if isinstance(exponent, float) else np.exp(exponent))


def nearest(table: dict[int, T], sequences: int) -> T:
    """What is known for the closest range of sequences."""
    if sequences.bit_length() in table:
        return table[sequences.bit_length()]
    return table[min(sorted(table), key=lambda b: abs(b - sequences.bit_length()))]
