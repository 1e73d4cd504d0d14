"""What is known of one sequence, and what levels of drafts are expected to bring it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from foretell.control.length.goodput.habits import Habits
from foretell.control.length.goodput.prices import Prices
from foretell.core.feedback import Verdict


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

    def curve(self, most: int) -> Curves:
        """Of this sequence alone."""
        return curves([self], most)


class Curves(NamedTuple):
    """What levels 1..K of drafts are expected to bring each of B sequences."""

    gain: np.ndarray  # [B, K] emitted tokens that the level adds
    rows: np.ndarray  # [B, K] rows of the forward that it adds
    drafted: np.ndarray  # [B, K] P(it is drafted)
    found: np.ndarray  # [B] how often anything is drafted


def curves(
    records: Sequence[Record], most: int, price: Prices | None = None, hope: bool = True
) -> Curves:
    """price: what drafts must be worth where their drafter says how sure it is (`Doubt`). hope:
    whether what was seldom tried counts as better than it looked."""
    w = Record.WEIGHT
    numbers = np.array([(r.tried, r.won, r.total, r.asks, r.found) for r in records])
    tried, won, total, asks, found = numbers.T
    gain, rows, drafted = (np.empty((len(records), most)) for _ in range(3))
    for habits in {id(r.habits): r.habits for r in records}.values():
        mine = np.array([r.habits is habits for r in records])
        usual = habits.read()
        seen = (found[mine] + w * usual.there[0]) / (asks[mine] + w)
        own = (won[mine] + w * (usual.hope if hope else usual.mean)) / (tried[mine] + w)
        if hope:
            own += Record.HOPE * np.sqrt(own * (1 - own) / (total[mine] + w) / mine.sum())
        there, right = usual.there[:most].copy(), usual.right[:most].copy()
        there[0] = right[0] = 1.0
        there = there.cumprod()
        if price is not None and habits.doubt.ready and usual.widths.max() == 1.0:
            look = habits.doubt.outlook(price, most)
            each = look.gain / np.concatenate([[1.0], np.maximum(look.gain[:-1], 1e-9)])
            rates = np.minimum(own[:, None] / usual.mean * each, 0.995)
            drafted[mine] = seen[:, None] * look.drafted * there
            rows[mine] = seen[:, None] * look.kept * there
        else:
            rates = np.minimum(own[:, None] * usual.shape[:most], 0.995)
            drafted[mine] = seen[:, None] * there
            rows[mine] = drafted[mine] * usual.widths[:most]
        gain[mine] = seen[:, None] * (right * rates).cumprod(1)
        found[mine] = seen
    return Curves(gain, rows, drafted, found)


def welcome(records: Sequence[Record]) -> None:
    """Newcomers do as most of those do whose drafts are like theirs, or as the last one did."""
    if all(r.met for r in records):
        return
    for r in records:
        if not r.met:
            known = sorted(o.tokens for o in records if o.met and o.habits is r.habits)
            levels = known[len(known) // 2] if known else r.habits.levels
            r.tokens, r.met = levels or 0, levels is not None
