"""Recursive speculative decoding with constant branching."""

from __future__ import annotations

from torch import Tensor

from foretell.core.protocols import Budget, SeqView
from foretell.drafters.trees.growing import Levels
from foretell.drafters.trees.options import whole
from foretell.drafters.trees.shape import Shape


class RsdC(Shape):
    """Every node of level l gets ``widths[l]`` different children: draws without replacement, by
    the Gumbel-top-k trick (the largest q / E), in draw order; the most probable ones when greedy.

    Paper: Jeon et al., "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling
    Without Replacement" (2024). Promise: keeps that of the verifier.
    """

    name = "rsd-c"
    paper = (
        "Recursive Speculative Decoding: Accelerating LLM Inference "
        "via Sampling Without Replacement"
    )
    summary = "a number of different draws below every node, level by level"

    def __init__(self, widths: str = "3/2/1/1") -> None:
        self.widths = whole(self.name, "widths", widths)
        self.depth = len(self.widths)

    def grow(self, view: SeqView, budget: Budget) -> WidthsGrower:
        return WidthsGrower(view, self.within(budget), self.widths)


class WidthsGrower(Levels):
    """widths[l]: children of every node of level l."""

    def __init__(self, view: SeqView, budget: Budget, widths: list[int]) -> None:
        super().__init__(view, budget)
        self.widths = widths

    def expand(self, logits: Tensor) -> None:
        width = self.widths[self.level(self.front[0])]
        fresh: list[int] = []
        for below in self.drawn(logits, self.front, width):
            fresh += self.add(below, 0, width)
        self.front = [n for n in fresh if self.goes_on(n)]
