"""EAGLE-2's dynamic tree: expand generously, then keep the best."""

from __future__ import annotations

from torch import Tensor

from foretell.core.protocols import Budget, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.trees.growing import Levels
from foretell.drafters.trees.options import at_least_one
from foretell.drafters.trees.shape import Shape


class Eagle2(Shape):
    """On each of `depth` levels the `width` best nodes get `width` children; of all of them the
    `nodes` with the most probable paths become the draft.

    The choice looks at each token's own probability, so tokens drawn from q would bias the output:
    under rejection the most probable tokens are drafted instead, without q rows, which is lossless.
    A child's value is its parent's times a number that is at most one, and ties go to the older
    node, so the kept nodes always form a tree. Expansion ends early where no child could be kept.

    Paper: Li et al., "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees"
    (2024). Promise: keeps that of the verifier.
    """

    name = "eagle2"
    paper = "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees"
    summary = "expand the best nodes of each level, then keep the best of all"
    holds = frozenset({"tree", "onehot"})
    draws = frozenset()

    def __init__(self, nodes: int = 16, width: int = 4, depth: int = 5) -> None:
        at_least_one(self.name, nodes=nodes, width=width, depth=depth)
        self.nodes, self.width, self.depth = nodes, width, depth

    def grow(self, view: SeqView, budget: Budget) -> RerankGrower:
        return RerankGrower(view, self.within(budget, self.nodes), self.width)


class RerankGrower(Levels):
    def __init__(self, view: SeqView, budget: Budget, width: int) -> None:
        super().__init__(view, budget, sampled=False)
        self.width = width
        self.value: list[float] = []  # of each node: the product of the weights on its path

    @property
    def room(self) -> int:
        return 1 << 30  # more nodes are looked at than kept

    def expand(self, logits: Tensor) -> None:
        fresh: list[int] = []
        for below in self.drawn(logits, self.front, self.width):
            above = self.value[below.node] if below.node >= 0 else 1.0
            fresh += self.add(below, 0, self.width)
            self.value += [above * min(w, 1.0) for w in below.weight]
        kept = set(self.best())
        fresh = [n for n in fresh if n in kept and self.goes_on(n)]  # below others nothing is
        self.front = sorted(sorted(fresh, key=self._rank)[: self.width])

    def best(self) -> list[int]:
        """The kept nodes so far, parents first."""
        return sorted(sorted(range(len(self.tokens)), key=self._rank)[: self.budget.nodes])

    def _rank(self, node: int) -> tuple[float, int]:
        return -self.value[node], node

    def tree(self) -> TokenTree:
        kept = self.best()
        place = {node: i for i, node in enumerate(kept)} | {-1: -1}
        return TokenTree.build(
            self.view.pending,
            [self.tokens[n] for n in kept],
            [place[self.parents[n]] for n in kept],
            score=[self.scores[n] for n in kept],
        )
