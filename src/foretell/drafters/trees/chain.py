"""No branches: one token after another."""

from __future__ import annotations

from torch import Tensor

from foretell.core.errors import InputError
from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.rows import argmax_rows
from foretell.drafters.trees.growing import Drawn, Levels
from foretell.drafters.trees.shape import Shape


class Chain(Shape):
    """`depth` tokens in a row: classic speculative decoding.

    Paper: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023).
    Promise: keeps that of the verifier.
    """

    name = "chain"
    paper = "Fast Inference from Transformers via Speculative Decoding"
    summary = "one token after another, no branches"
    holds = frozenset({"chain", "onehot", "q"})

    def __init__(self, depth: int = 3) -> None:
        if depth < 1:
            raise InputError("A chain needs depth >= 1.")
        self.depth = depth

    def grow(self, view: SeqView, budget: Budget) -> ChainGrower:
        return ChainGrower(view, self.within(budget))


class ChainGrower(Levels):
    """The path of first draws. Without anything to score or to draw it takes the argmax."""

    def expand(self, logits: Tensor) -> None:
        node, view = self.front[0], self.view
        asks = self.budget.stop is not None or self.budget.unsure is not None
        if self.how is Draw.TOP and view.plain and not asks:
            below = Drawn(node, argmax_rows(logits[:1]), [1.0], [1.0], [None], [1.0])
        else:
            below = self.drawn(logits, self.front, 1)[0]
        fresh = self.add(below, 0, 1)
        self.front = [n for n in fresh if self.goes_on(n)]
