"""Stop drafting when some draft has probably been refused already."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from foretell.control.length.company import decided, learner, tried
from foretell.control.length.fixed import UNLIMITED
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Draw, Load, SeqView, Timings
from foretell.core.tree import TokenTree

EDGES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def isotonic(means: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The closest rising sequence, by weighted least squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for mean, weight in zip(means, weights, strict=True):
        blocks.append((mean, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, v, m), (b, w, n) = blocks[-2], blocks.pop()
            blocks[-1] = ((a * v + b * w) / (v + w), v + w, m + n)
    return [mean for mean, _, n in blocks for _ in range(n)]


class Acceptance:
    """P(a drafted token is accepted | those above it were) from the drafter's score of it.

    Scores are counted in bins as verdicts come; a bin leans on its prior with the weight of some
    observations, old ones fade, and a higher score never means less.
    """

    KEEP, WEIGHT = 0.998, 4.0

    def __init__(self) -> None:
        middles = [(a + b) / 2 for a, b in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True)]
        self.prior = [0.25 + 0.72 * m for m in middles]
        self.won = [0.0] * len(middles)
        self.tried = [0.0] * len(middles)
        self.map = list(self.prior)

    def __call__(self, score: float) -> float:
        return self.map[bisect_right(EDGES, score)]

    def observe(self, pairs: Sequence[tuple[float, bool]]) -> None:
        """(score, accepted) of drafts that were tried."""
        if not pairs:
            return
        self.won = [self.KEEP * x for x in self.won]
        self.tried = [self.KEEP * x for x in self.tried]
        for score, accepted in pairs:
            b = bisect_right(EDGES, score)
            self.tried[b] += 1
            self.won[b] += accepted
        w = self.WEIGHT
        weights = [n + w for n in self.tried]
        means = [(won + w * p) / n for won, p, n in zip(self.won, self.prior, weights, strict=True)]
        self.map = isotonic(means, weights)


class SpecDecPlusPlus:
    """Stop when the probability that at least one drafted token of the path is refused,
    1 - prod(c), exceeds `threshold`; the last token stays.

    c is the chance of a token to be accepted, learned online from the drafter's own score of it
    (`Acceptance`). A drafter with a trained acceptance head hands the head's output over as
    scores, and it is calibrated in the same way. Only tokens that stay in the draft are looked at,
    so the rule is lossless. Learned by all sequences together where drafts never change the output,
    by each alone under rejection. The best threshold depends on what a draft costs: the cheaper,
    the higher (with draft levels at a tenth of a target forward, 0.7; at a half, 0.3). Drafters
    without scores are not affected.

    Paper: Huang et al., "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths"
    (2024). Promise: keeps that of the verifier.
    """

    name = "specdec++"
    paper = "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths"
    summary = "stop when some draft has probably been refused already"

    def __init__(self, threshold: float = 0.5, tokens: int = UNLIMITED) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(f"specdec++:threshold={threshold} lies outside 0..1.")
        self.threshold, self.tokens = threshold, tokens
        self.shared: dict[Draw, Acceptance] = {}
        self.views: list[SeqView] = []

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        self.views = list(views)
        return [self._budget(learner(v, self.shared, Acceptance)) for v in views]

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        for view, tree, verdict in decided(self.views, trees, verdicts):
            if tree.score is not None:
                pairs = [(float(tree.score[n]), won) for n, won in tried(tree, verdict)]
                learner(view, self.shared, Acceptance).observe(pairs)

    def _budget(self, chance: Acceptance) -> Budget:
        least = 1 - self.threshold

        def stop(scores: Sequence[float]) -> bool:
            whole = 1.0
            for score in scores:
                whole *= chance(score)
            return whole < least

        return Budget(UNLIMITED, self.tokens, stop=stop)
