"""What a drafter's scores are worth, and where a draft ends that is not worth going on with."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from foretell.control.length.company import tried
from foretell.core.feedback import Verdict
from foretell.core.tree import TokenTree

EDGES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)


class Doubt:
    """How often drafted tokens are accepted, by the score their drafter gave them. Scores are
    ranked between `EDGES` and never taken at their word: drafters are seldom calibrated."""

    KEEP = 0.998
    WEIGHT = 8.0  # verdicts that the mean over all scores is worth to each range of them
    ENOUGH = 64.0  # verdicts before anything is doubted

    def __init__(self) -> None:
        self.tried, self.won = [0.0] * (len(EDGES) + 1), [0.0] * (len(EDGES) + 1)
        self.weight = 1.0  # of the next verdict: it grows, and so the old ones fade
        self.total = 0.0
        self.mean = 0.0  # over all scores
        self._rates: list[float] = []  # since the last verdict

    def observe(self, tree: TokenTree, verdict: Verdict) -> None:
        if tree.score is None:
            return
        for node, won in judged(tree, verdict):
            i = bisect_right(EDGES, float(tree.score[node]))
            self.tried[i] += self.weight
            self.won[i] += self.weight * won
            self.weight /= self.KEEP
            self.total += 1
        self._rates = []
        if self.weight > 1e9:
            self.tried = [x / self.weight for x in self.tried]
            self.won = [x / self.weight for x in self.won]
            self.weight = 1.0

    def rates(self) -> list[float]:
        """P(accepted | the text before it is) by range of scores."""
        if not self._rates:
            some = self.WEIGHT * self.weight
            self.mean = mean = sum(self.won) / max(sum(self.tried), 1e-9)
            self._rates = [
                (w + some * mean) / (t + some) for t, w in zip(self.tried, self.won, strict=True)
            ]
        return self._rates

    def end(self, price: Sequence[float]) -> Callable[[Sequence[float]], bool]:
        """A `Budget.stop`: whether the next level is worth less than it costs. price [K]: tokens
        that going on behind 1, 2, .. levels costs."""

        def stop(scores: Sequence[float]) -> bool:
            level = len(scores)
            if self.total < self.ENOUGH or level > len(price):
                return False
            rates, path = self.rates(), 1.0
            for s in scores:
                path *= rates[bisect_right(EDGES, s)]
            return path * self.mean < price[level - 1]

        return stop


def judged(tree: TokenTree, verdict: Verdict) -> Iterator[tuple[int, bool]]:
    """`tried`, quickly where the draft is a chain."""
    n = len(tree) - tree.n_context
    if n and tree.depth[-1] - tree.depth[tree.tip] == n:
        for level in range(verdict.checked):
            yield tree.tip + 1 + level, level < verdict.accepted
    else:
        yield from tried(tree, verdict)


def prices(
    count: int,
    rows: np.ndarray,
    forward: Callable[[np.ndarray], np.ndarray],
    drafting: np.ndarray,
    rate: float,
) -> list[float]:
    """What a sequence's going on behind 1, 2, .. levels costs, in tokens. rows [B, K], forward: as
    in `allocate`; drafting [K]: seconds of drafting 1, 2, .. levels; rate: tokens per second
    that the machine makes anyway."""
    more = rows.sum(0)
    total = count + np.concatenate([[0.0], more.cumsum()])
    each = (np.diff(forward(total)) / np.maximum(more, 1e-3))[1:]
    return ((each + np.diff(drafting) / np.maximum(more[1:], 1.0)) * rate).tolist()
