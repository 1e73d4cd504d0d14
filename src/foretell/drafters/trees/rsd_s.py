"""Recursive speculative decoding with stochastic beam search."""

from __future__ import annotations

from torch import Tensor

from foretell.core.protocols import Budget, Draw, SeqView
from foretell.drafters.trees.growing import Drawn, Levels
from foretell.drafters.trees.options import at_least_one
from foretell.drafters.trees.shape import Shape


class RsdS(Shape):
    """On each of `depth` levels the `width` first sequences of a draw without replacement.

    Every node carries the time at which its exponential clock first rings; a child's clock runs at
    the rate of its path's probability, and the first of the siblings rings when the parent did. By
    the lack of memory the others ring at ``t + (1 / key_i - 1 / key_0) / path_probability``, keys
    as in `draw.ranked`; the `width` earliest of the level are kept. This is the paper's truncated
    Gumbel recursion with t = exp(-perturbed log-probability), without its cancellations. Whether a
    node is kept depends on its time, which is independent of its token given those before it: that
    is lossless. When greedy it is beam search; under replay a beam by the share of q / E.

    Paper: Jeon et al., "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling
    Without Replacement" (2024). Promise: keeps that of the verifier.
    """

    name = "rsd-s"
    paper = (
        "Recursive Speculative Decoding: Accelerating LLM Inference "
        "via Sampling Without Replacement"
    )
    draws = frozenset()
    summary = "stochastic beam search: draws of whole paths without replacement"

    def __init__(self, width: int = 4, depth: int = 4) -> None:
        at_least_one(self.name, width=width, depth=depth)
        self.width, self.depth = width, depth

    def grow(self, view: SeqView, budget: Budget) -> BeamGrower:
        return BeamGrower(view, self.within(budget), self.width)


class BeamGrower(Levels):
    def __init__(self, view: SeqView, budget: Budget, width: int) -> None:
        super().__init__(view, budget)
        self.width = width
        self.mass = {-1: 1.0}  # probability of each frontier node's path
        self.time = {-1: 0.0}

    def expand(self, logits: Tensor) -> None:
        ranked = []  # (what to sort by, index of the frontier node, its j-th candidate)
        drawn = self.drawn(logits, self.front, self.width)
        for i, below in enumerate(drawn):
            ranked += [(t, i, j) for j, t in enumerate(self.times(below))]
        ranked.sort()
        mass, time = {}, {}
        for t, i, j in ranked[: min(self.width, self.room)]:
            (node,) = self.add(drawn[i], j, j + 1)
            mass[node] = self.mass[drawn[i].node] * drawn[i].weight[j]
            time[node] = t
        self.mass, self.time = mass, time
        self.front = [n for n in mass if self.goes_on(n)]

    def times(self, below: Drawn) -> list[float]:
        """When each candidate's clock rings; -path probability where nothing is drawn."""
        mass = self.mass[below.node]
        if self.how is not Draw.SAMPLE:
            return [-mass * w for w in below.weight]
        start, first = self.time[below.node], below.keys[0] if below.ids else 1.0
        rate = max(mass, 1e-300)
        return [start + (1 / key - 1 / first) / rate for key in below.keys]
