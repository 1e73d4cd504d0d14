"""How often the child of which rank is accepted, on which level: learned from verdicts."""

from __future__ import annotations

import numpy as np

from foretell.core.feedback import Verdict
from foretell.core.tree import TokenTree


class Acceptance:
    """Running estimate of ``rates`` [D, R] (see `plan.Plan`).

    What is counted are hazards: how often the child of rank r was accepted where all before it were
    refused. A level's hazard leans on that of all levels, and that on the `prior` [R] (of hazards),
    each with the weight of some observations, so that ranks and levels never tried keep a guess.
    Old observations fade.
    """

    WEIGHT = 8.0  # observations that a prior is worth
    KEEP = 0.995  # what is left of an observation after every further verdict

    def __init__(self, prior: list[float], depth: int) -> None:
        self.prior = np.asarray(prior, float)
        self.tried = np.zeros((depth, len(prior)))
        self.won = np.zeros((depth, len(prior)))
        self.seen = 0  # verdicts

    def observe(self, tree: TokenTree, verdict: Verdict) -> None:
        if not verdict.checked:
            return
        self.seen += 1
        self.tried *= self.KEEP
        self.won *= self.KEEP
        depth, ranks = self.tried.shape
        for level in range(min(verdict.checked, depth)):
            node = verdict.path[level - 1] if level else tree.tip
            children = tree.children(node)
            hit = len(children)
            if level < len(verdict.path):
                hit = children.index(verdict.path[level])
                if hit < ranks:
                    self.won[level, hit] += 1
            self.tried[level, : hit + 1 if hit < len(children) else hit] += 1

    def rates(self) -> np.ndarray:
        """[D, R]"""
        pooled = (self.won.sum(0) + self.WEIGHT * self.prior) / (self.tried.sum(0) + self.WEIGHT)
        hazard = (self.won + self.WEIGHT * pooled) / (self.tried + self.WEIGHT)
        before = np.cumprod(1 - hazard, 1)
        return hazard * np.concatenate([np.ones((len(hazard), 1)), before[:, :-1]], 1)


def hazards(rates: list[float]) -> list[float]:
    """P(child r is the accepted one) for each r -> P(accepted | all before it refused)."""
    left, result = 1.0, []
    for p in rates:
        result.append(min(1.0, p / left) if left > 0 else 0.0)
        left -= p
    return result
