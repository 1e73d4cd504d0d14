"""What `goodput` does to learn of the way it does not go, and the credit that pays for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from foretell.control.length.goodput.allocate import other_way
from foretell.control.length.goodput.prices import Prices
from foretell.control.length.goodput.records import Record, curves
from foretell.control.length.goodput.steptime import StepTime, whole
from foretell.core.feedback import Verdict
from foretell.core.protocols import SeqView, Timings


class Probes:
    """Sequences that are given nothing draft now and then all the same (a probe), and where all
    draft a step now and then goes without (a spell), so that what this would cost and bring is
    measured and not guessed.

    Each is expected to lose some seconds, which may be none (`settle`). They are paid from a
    credit: `SHARE` of the time, and what `CREDIT` tokens are worth in the beginning. A probe pays
    what it turns out to have lost.

    plain: whether steps without drafts teach anything.
    """

    SHARE = 0.005
    CREDIT = 6.0
    DEBT = 2.0  # steps that a probe may turn out to have lost: an interruption does not count whole
    EXPLORERS = 4  # sequences of a probe: each must catch up first
    STEPS = 3  # of a probe: in the first one drafters catch up, the others are like any other
    SPELL = 2  # steps without drafts for their own sake; the first finds cold caches
    SELDOM = 16  # steps between two spells
    AHEAD = 6  # a lead of drafting over plain decoding makes spells that many powers dearer

    def __init__(self, time: StepTime, plain: bool) -> None:
        self.time, self.plain = time, plain
        self.credit = math.inf  # seconds that may be lost; the first `settle` cuts it to size
        self.earned = 0.0  # seconds a step brings it
        self.price = self.plain_price = 0.0  # seconds a probe, a spell is expected to lose
        self.depth = 1  # levels of a probe
        self.who: list[Record] = []  # of the last probe
        self.left = 0  # steps of the probe that are still to come, and this one
        self.drafting = 0.0  # seconds that a probe which begins with this step should draft for
        self.spell = 0  # steps without drafts that are still to come
        self.drafted = 0  # steps since nobody drafted

    @property
    def cold(self) -> bool:
        """Whether this step's forward finds the caches full of something else."""
        return bool(self.drafting) or (self.spell > 0 and self.spell == self.SPELL - 1)

    def rest(self) -> bool:
        """Whether this step needs no look, because no probe goes on and none can be paid; it is
        counted then."""
        if self.left > 1 or self.price <= self.credit + self.earned:
            return False
        self.credit += self.earned
        return True

    def look(
        self,
        views: Sequence[SeqView],
        records: Sequence[Record],
        levels: Sequence[int],
        limits: Sequence[int],
        vary: bool,
    ) -> list[int]:
        """The levels of this step, where `levels` are those that were chosen. vary: whether to
        move them by one if drafts were so much alike that what a level takes cannot be told."""
        levels = list(levels)
        self.credit, self.drafting = self.credit + self.earned, 0.0
        self.left = max(0, self.left - 1)
        idle = idlers(levels, limits)
        if self.left:
            for i in idle:
                if any(records[i] is r for r in self.who):
                    levels[i] = min(self.depth, limits[i])
        elif idle:
            if self.credit >= self.price:
                self._begin(self.explorers(views, records, idle), records, levels, limits)
        elif self.plain and self.drafted + 1 >= self.SELDOM and self.credit >= self.plain_price:
            self.credit -= self.plain_price
            self.spell = self.SPELL
        elif vary and self.time.one_sided(len(levels)):
            levels = [k - 1 or min(2, n) for k, n in zip(levels, limits, strict=True)]
        if self.spell:
            self.spell, levels = self.spell - 1, [0] * len(levels)
        self.drafted = 0 if self.spell or not any(levels) else self.drafted + 1
        return levels

    def _begin(
        self,
        chosen: Sequence[int],
        records: Sequence[Record],
        levels: list[int],
        limits: Sequence[int],
    ) -> None:
        for i in chosen:
            levels[i] = min(self.depth, limits[i])
        self.who, self.left = [records[i] for i in chosen], self.STEPS
        self.drafting = max(float(self.time.drafting(max(levels), sum(map(bool, levels)))), 1e-9)

    def explorers(
        self, views: Sequence[SeqView], records: Sequence[Record], idle: Sequence[int]
    ) -> list[int]:
        """Who of the idle would probe: those that drafted last, and one that never has (it makes a
        draft model read its whole prompt first)."""
        known = [i for i in idle if records[i].drafted]
        chosen = sorted(known, key=lambda i: -records[i].last)[: self.EXPLORERS]
        fresh = [i for i in idle if not records[i].drafted]
        if fresh:
            chosen.append(min(fresh, key=lambda i: len(views[i].tokens)))
        return chosen

    def observe(self, timings: Timings, verdicts: Sequence[Verdict], rate: float) -> None:
        """After every step; rate: tokens per second that the last choice promised. Where a prompt
        was read beside a probe only its drafting tells what it lost more than expected; where the
        clock is not to be looked at it lost what was expected."""
        if not self.left:
            return
        if self.time.draft is not None:
            self.credit -= self.price / self.STEPS
        elif timings.decoding:
            tokens = sum(len(v.tokens) for v in verdicts)
            self.credit -= timings.draft + whole(timings) - tokens / rate
        else:
            self.credit -= self.price / self.STEPS + max(0.0, timings.draft - self.drafting)

    def settle(
        self,
        views: Sequence[SeqView],
        records: Sequence[Record],
        levels: Sequence[int],
        limits: Sequence[int],
        most: int,
        forward: Callable[[np.ndarray], np.ndarray],
        rate: float,
        price: Prices,
    ) -> None:
        """After a choice that promises `rate` tokens per second: what the other way is expected to
        lose, and what may be lost for it. most: levels that `forward` knows (as in `allocate`);
        price: as in `curves`."""
        n = len(records)
        step = n / max(rate, 1e-12)  # seconds that the tokens of plain decoding are worth
        full = self.CREDIT * step / n
        self.credit = max(min(self.credit, max(full, self.price)), -self.DEBT * step)
        self.earned = self.SHARE * step
        idle = idlers(levels, limits)
        if idle:
            who = self.explorers(views, records, idle)
            gain, rows, *_ = curves(records, most, price, hope=False)
            draft = self.time.drafting
            self.depth, loss = other_way(levels, who, gain, rows, forward, draft, rate)
            self.price = self.STEPS * max(0.0, loss)
        else:
            plain = float(forward(np.array([float(n)]))[0])
            lead = max(1.0, plain / step)  # the greater it is, the less a spell could change
            self.plain_price = self.SPELL * lead**self.AHEAD * max(0.0, plain - step)


def idlers(levels: Sequence[int], limits: Sequence[int]) -> list[int]:
    """The sequences that could draft and are given nothing."""
    return [i for i, (k, n) in enumerate(zip(levels, limits, strict=True)) if k == 0 < n]
