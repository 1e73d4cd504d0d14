"""What a drafter's scores are worth: where a draft ends, and what of it is verified."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from foretell.control.length.company import tried
from foretell.control.length.goodput.prices import Prices
from foretell.core.feedback import Verdict
from foretell.core.stop import PathStop, chances
from foretell.core.tree import TokenTree

EDGES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
LEAST = 0.02  # P(drafted) of the last level that is foreseen
STEP = 0.05  # of the logarithm of a path's chance, where drafts are foreseen
CELLS = 80  # of them; paths with less chance are alike
BEYOND = CELLS + np.arange(CELLS) - np.arange(CELLS)[:, None]  # [from, to]: CELLS + cells on
FREE = 0.01  # tokens that drafting a level further costs: less is not worth a look


class Outlook(NamedTuple):
    """What drafts are expected to come to; arrays [K] are by level."""

    drafted: np.ndarray  # P(the level is drafted)
    kept: np.ndarray  # P(it is verified)
    gain: np.ndarray  # accepted tokens that it brings


class Doubt:
    """How often drafted tokens are accepted, by the score their drafter gave them. Scores are
    ranked between `EDGES` and never taken at their word: drafters are seldom calibrated."""

    KEEP = 0.999
    WEIGHT = 4.0  # verdicts that the mean over all scores is worth to each range of them
    ENOUGH = 64.0  # verdicts before anything is doubted

    def __init__(self) -> None:
        self.tried, self.won, self.first, self.later = ([0.0] * (len(EDGES) + 1) for _ in range(4))
        """By score: verdicts, accepted tokens, tokens that began a draft, tokens behind them."""
        self.weight = 1.0  # of the next verdict: it grows, and so the old ones fade
        self.total = 0.0
        self.drafts = 0
        self._rates: list[float] = []  # since the last verdict
        self._shares: tuple[np.ndarray, np.ndarray] | None = None
        self._least: tuple[Prices, list[float]] | None = None  # for these prices

    @property
    def ready(self) -> bool:
        return self.total >= self.ENOUGH and self.drafts > 0

    def saw(self, scores: Sequence[float]) -> None:
        """Of a draft, a chain, whatever is verified of it."""
        self.drafts += 1
        self.first[bisect_right(EDGES, scores[0])] += self.weight
        for score in scores[1:]:
            self.later[bisect_right(EDGES, score)] += self.weight

    def observe(self, tree: TokenTree, verdict: Verdict) -> None:
        if tree.score is None:
            return
        scores = tree.score.tolist()
        for node, won in judged(tree, verdict):
            i = bisect_right(EDGES, scores[node])
            self.tried[i] += self.weight
            self.won[i] += self.weight * won
            self.weight /= self.KEEP
            self.total += 1
        self._rates, self._shares = [], None
        if self.weight > 1e9:
            for counts in (self.tried, self.won, self.first, self.later):
                counts[:] = [x / self.weight for x in counts]
            self.weight = 1.0

    def rates(self) -> list[float]:
        """P(accepted | the text before it is) by range of scores."""
        if not self._rates:
            some = self.WEIGHT * self.weight
            mean = sum(self.won) / max(sum(self.tried), 1e-9)
            self._rates = [
                (w + some * mean) / (t + some) for t, w in zip(self.tried, self.won, strict=True)
            ]
        return self._rates

    def shares(self) -> tuple[np.ndarray, np.ndarray]:
        """How frequent scores are: of tokens that begin drafts, and of others."""
        if self._shares is None:
            first, later = np.array(self.first), np.array(self.later)
            first /= max(first.sum(), 1e-9)
            later += self.WEIGHT * self.weight * first
            self._shares = first, later / later.sum()
        return self._shares

    def path(self, tree: TokenTree) -> list[float]:
        """Of a draft that may be cut the chance that it gets to its 1st, 2nd, .. token; nothing as
        long as there is no doubt, of trees, of drafts without scores, and where tokens were drawn
        from a q."""
        if tree.score is None or tree.qrow is not None or not is_chain(tree):
            return []
        scores = tree.score[tree.n_context :].tolist()
        self.saw(scores)
        return chances(EDGES, self.rates(), scores) if self.ready else []

    def stop(self, prices: Prices) -> PathStop:
        """Ends drafts where the next level would not be worth drafting; none, as long as there is
        no doubt and where drafting costs next to nothing (what is verified of it is `cut`)."""
        if not self.ready or max(prices.draft, default=0.0) < FREE:
            return PathStop(EDGES, (), ())
        if self._least is None or self._least[0] is not prices:
            self._least = prices, self.least(prices).tolist()
        return PathStop(EDGES, self.rates(), self._least[1])

    def least(self, prices: Prices) -> np.ndarray:
        """[K] the least chance of a path behind which to draft on: a token more is verified if it
        is likelier than a row costs, and then worth the difference."""
        rates, later = np.array(self.rates()), self.shares()[1]
        chance = np.exp(-STEP / 4 * np.arange(4 * CELLS))
        worth = np.maximum(chance[:, None] * rates - prices.row, 0.0) @ later  # falling
        draft = np.array(prices.draft)
        some = np.searchsorted(-worth, -draft, side="right") - 1
        return np.where(draft < FREE, 0.0, np.where(some < 0, 2.0, chance[some]))

    def outlook(self, prices: Prices, most: int) -> Outlook:
        """Of levels 1..most, where drafts end as `stop` says and only what is worth its row is
        verified. Foreseen from the scores that there were, as if each level's did not depend on
        those before it: a way of drafting need not have been tried to be judged."""
        rates, least = np.array(self.rates()), self.least(prices)
        first, later = self.shares()
        cell = np.minimum(np.rint(-np.log(np.maximum(rates, 1e-9)) / STEP), CELLS - 1).astype(int)
        chance = np.exp(-STEP * np.arange(CELLS))  # of a path
        kernel = np.bincount(cell, later, CELLS)
        onward = np.concatenate([np.zeros(CELLS), kernel])[BEYOND]  # [from, to]
        onward[:, -1] = kernel[::-1].cumsum()
        mass = np.zeros((most, CELLS))  # of drafts, by the chance of their path
        mass[0] = np.bincount(cell, first, CELLS)
        for level in range(1, min(most, len(least) + 1)):
            mass[level] = np.where(chance >= least[level - 1], mass[level - 1], 0.0) @ onward
        drafted = mass.sum(1)
        mass *= np.minimum.accumulate(drafted >= LEAST)[:, None] & (chance >= prices.row)
        return Outlook(drafted, mass.sum(1), mass @ chance)


def judged(tree: TokenTree, verdict: Verdict) -> Iterator[tuple[int, bool]]:
    """`tried`, quickly where the draft is a chain."""
    if is_chain(tree):
        for level in range(verdict.checked):
            yield tree.tip + 1 + level, level < verdict.accepted
    else:
        yield from tried(tree, verdict)


def is_chain(tree: TokenTree) -> bool:
    """Whether something is drafted, and a node a level."""
    return len(tree) > tree.n_context and tree.is_chain
