"""A tree with the same number of children below every node it expands."""

from __future__ import annotations

import math

from torch import Tensor

from foretell.core.protocols import Budget, Draw, SeqView
from foretell.drafters.trees.growing import Levels
from foretell.drafters.trees.multi_path import PathsGrower
from foretell.drafters.trees.options import at_least_one
from foretell.drafters.trees.shape import Shape


class KAry(Shape):
    """Every expanded node gets `branching` children; on each of `depth` levels the `branching`
    most probable paths are expanded.

    Under rejection the children are drawn from q without replacement. Which of them is expanded may
    depend on their own q, since they stay in the tree either way. For multi-path rules it is
    `branching` independent chains.
    Paper: the token tree of Miao et al., "SpecInfer: Accelerating Large Language Model Serving with
    Tree-based Speculative Inference and Verification" (2023). Promise: keeps that of the verifier.
    """

    name = "k-ary"
    paper = (
        "SpecInfer: Accelerating Large Language Model Serving with Tree-based "
        "Speculative Inference and Verification"
    )
    draws = frozenset({Draw.IID, Draw.TOP_ONE, Draw.PATHS})
    summary = "as many children below the most probable paths of each level"

    def __init__(self, branching: int = 2, depth: int = 3) -> None:
        at_least_one(self.name, branching=branching, depth=depth)
        self.branching, self.depth = branching, depth

    def grow(self, view: SeqView, budget: Budget) -> KAryGrower | PathsGrower:
        budget = self.within(budget)
        if view.draw is Draw.PATHS:
            return PathsGrower(view, budget, self.branching)
        return KAryGrower(view, budget, min(self.branching, budget.branching))


class KAryGrower(Levels):
    def __init__(self, view: SeqView, budget: Budget, width: int) -> None:
        super().__init__(view, budget)
        self.width = width

    def expand(self, logits: Tensor) -> None:
        fresh: list[int] = []
        for below in self.drawn(logits, self.front, self.width):
            fresh += self.add(below, 0, self.width)
        fresh = [n for n in fresh if self.goes_on(n)]
        fresh.sort(key=lambda n: -math.prod(self.scores[a] for a in self.paths[n]))
        self.front = sorted(fresh[: self.width])
