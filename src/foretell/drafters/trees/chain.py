"""No branches: one token after another."""

from __future__ import annotations

from torch import Tensor

from foretell.core.errors import InputError
from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.rng import Purpose
from foretell.core.rows import argmax_rows, peak
from foretell.core.tree import TokenTree
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

    @property
    def greedy(self) -> bool:
        """Whether it is the path of the largest logits, whatever else they are."""
        return self.how is Draw.TOP and self.view.plain and self.budget.unsure is None

    def alone(self) -> tuple[float, list[int]] | None:
        """How the model can grow it alone (`core.protocols.Chains`): temperature and keys; None
        where somebody has to look at the rows."""
        view = self.view
        if self.greedy:
            return 0.0, []
        if self.how is not Draw.NOISE or not view.plain or self.budget.unsure is not None:
            return None
        first = len(view.tokens)
        positions = range(first, first + min(self.budget.depth, self.budget.nodes))
        return view.params.temperature or 1.0, [view.rng.key(t, Purpose.TARGET) for t in positions]

    def take(self, tokens: list[int], scores: list[float]) -> None:
        """The whole draft at once, by somebody who has kept to the budget; scores: as far as
        anybody asked for them."""
        self.tokens, self.front = tokens, []
        self.scores = scores or [1.0] * len(tokens)

    def tree(self) -> TokenTree:
        if self.q or self.dead:
            return super().tree()
        return TokenTree.chain(self.view.pending, self.tokens, score=self.scores)

    def expand(self, logits: Tensor) -> None:
        node, budget = self.front[0], self.budget
        if self.greedy:
            if budget.stop is None:
                token, score = argmax_rows(logits[:1])[0], 1.0
            else:
                token, score = peak(logits[:1])
            below = Drawn(node, [token], [score], [score], [None], [score])
        else:
            below = self.drawn(logits, self.front, 1)[0]
        fresh = self.add(below, 0, 1)
        self.front = [n for n in fresh if self.goes_on(n)]
