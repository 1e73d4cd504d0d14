"""Stop drafting when the drafter doubts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from foretell.control.length.company import decided, learner, tried
from foretell.control.length.fixed import UNLIMITED
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Draw, Load, SeqView, Timings
from foretell.core.tree import TokenTree

MISSED = 3.0  # a good draft that was not made costs so many times a bad one that was


def refit(scores: np.ndarray, accepted: np.ndarray) -> float | None:
    """The threshold t that minimises FPR + 3 FNR of "accepted iff score >= t", over scores [n] and
    labels [n] bool; None while only one kind of label is known. Of equals the highest."""
    good, bad = int(accepted.sum()), int((~accepted).sum())
    if not good or not bad:
        return None
    order = np.argsort(-scores, kind="stable")
    ranked, right = scores[order], accepted[order].cumsum()
    last = np.append(ranked[1:] != ranked[:-1], True)  # one threshold for all that are equal
    wrong = np.arange(1, len(ranked) + 1) - right
    cost = wrong[last] / bad + MISSED * (1 - right[last] / good)
    return float(ranked[last][cost.argmin()])


class Threshold:
    """The threshold in force and the last verdicts it comes from."""

    WINDOW, ENOUGH, EVERY = 256, 16, 8

    def __init__(self, value: float) -> None:
        self.value = value
        self.pairs: deque[tuple[float, bool]] = deque(maxlen=self.WINDOW)
        self.fresh = 0

    def observe(self, pairs: Sequence[tuple[float, bool]]) -> None:
        self.pairs.extend(pairs)
        self.fresh += len(pairs)
        if self.fresh < self.EVERY or len(self.pairs) < self.ENOUGH:
            return
        self.fresh = 0
        scores, labels = zip(*self.pairs, strict=True)
        value = refit(np.array(scores), np.array(labels, bool))
        if value is not None:
            self.value = value


class Confidence:
    """Stop below a drafted token whose draft probability is under `threshold`; the token stays.

    Keeping it is what makes the rule lossless: only tokens that are already part of the draft are
    looked at. With refit=true (the default) the threshold is where it starts: from 16 verdicts on
    it is the one that tells accepted from refused drafts best among the last 256, a missed good
    draft counting three times a bad one, as transformers fits it. Learned by all sequences together
    where drafts never change the output, by each alone under rejection, where a seed must mean the
    same in any company. Drafters without scores are not affected. Source: the dynamic stop of
    transformers' assisted generation (`assistant_confidence_threshold`, default 0.4). Promise:
    keeps that of the verifier.
    """

    name = "confidence"
    paper = (
        "Dynamic Speculation Lookahead Accelerates Speculative Decoding of Large Language Models"
    )
    summary = "stop after a drafted token the drafter itself gave little probability"

    def __init__(self, threshold: float = 0.4, tokens: int = UNLIMITED, refit: bool = True) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(f"confidence:threshold={threshold} lies outside 0..1.")
        self.threshold, self.tokens, self.refit = threshold, tokens, refit
        self.shared: dict[Draw, Threshold] = {}
        self.views: list[SeqView] = []

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        self.views = list(views)
        return [self._budget(self._own(v).value if self.refit else self.threshold) for v in views]

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        if not self.refit:
            return
        for view, tree, verdict in decided(self.views, trees, verdicts):
            if tree.score is not None:
                pairs = [(float(tree.score[n]), won) for n, won in tried(tree, verdict)]
                self._own(view).observe(pairs)

    def _own(self, view: SeqView) -> Threshold:
        return learner(view, self.shared, lambda: Threshold(self.threshold))

    def _budget(self, threshold: float) -> Budget:
        def doubt(scores: Sequence[float]) -> bool:
            return scores[-1] < threshold

        return Budget(UNLIMITED, self.tokens, stop=doubt)
