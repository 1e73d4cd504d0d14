"""SpecInfer's expansion: a vector of widths, independent draws."""

from __future__ import annotations

from foretell.core.protocols import Budget, Draw, SeqView
from foretell.drafters.trees.options import whole
from foretell.drafters.trees.rsd_c import WidthsGrower
from foretell.drafters.trees.shape import Shape


class SpecInfer(Shape):
    """Every node of level l gets ``widths[l]`` children: independent draws from q where the rule
    tests drafts against q, the most probable tokens otherwise.

    Every draw has a q row of its own, so that rules test them one by one. A repeated draw is never
    accepted after the first one was refused, but its refusal counts: it stays, DEAD, and nothing is
    drafted below it.
    Paper: Miao et al., "SpecInfer: Accelerating Large Language Model Serving with Tree-based
    Speculative Inference and Verification" (2023). Promise: keeps that of the verifier.
    """

    name = "specinfer"
    paper = (
        "SpecInfer: Accelerating Large Language Model Serving with Tree-based "
        "Speculative Inference and Verification"
    )
    summary = "a number of independent draws below every node, level by level"
    draws = frozenset({Draw.IID})

    def __init__(self, widths: str = "1/1/3/1/1/1/1/1") -> None:
        self.widths = whole(self.name, "widths", widths)
        self.depth = len(self.widths)

    def grow(self, view: SeqView, budget: Budget) -> WidthsGrower:
        grower = WidthsGrower(view, self.within(budget), self.widths)
        if view.draw.from_q:
            grower.how = Draw.IID
        return grower
