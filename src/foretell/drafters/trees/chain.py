"""No branches: one token after another."""

from __future__ import annotations

from torch import Tensor

from foretell.core.errors import InputError
from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.rows import argmax_rows, peak
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
    """The path of first draws. Where nothing is drawn or changed it takes the argmax, and scores it
    only if somebody asks."""

    def expand(self, logits: Tensor) -> None:
        node, budget = self.front[0], self.budget
        if self.how is Draw.TOP and self.view.plain and budget.unsure is None:
            if budget.stop is None:
                token, score = argmax_rows(logits[:1])[0], 1.0
            else:
                token, score = peak(logits[:1])
            below = Drawn(node, [token], [score], [score], [None], [score])
        else:
            below = self.drawn(logits, self.front, 1)[0]
        fresh = self.add(below, 0, 1)
        self.front = [n for n in fresh if self.goes_on(n)]
