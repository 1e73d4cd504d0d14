"""K independent chains, merged into a trie: what multi-path rules verify (`Draw.PATHS`)."""

from __future__ import annotations

from torch import Tensor

from foretell.core.protocols import Budget, SeqView
from foretell.drafters.trees.growing import Levels


class PathsGrower(Levels):
    """`count` chains of one length, each drawn from q token by token.

    The length is what the budget allows for all of them, whatever is drawn; a policy's stop is not
    asked, since it would end some chains and not others.
    """

    def __init__(self, view: SeqView, budget: Budget, count: int) -> None:
        count = max(1, min(count, budget.branching, budget.nodes))
        length = min(budget.depth, budget.nodes // count)
        super().__init__(view, Budget(budget.nodes, length, count))
        self.through = {-1: count}  # chains through each node

    def expand(self, logits: Tensor) -> None:
        most = max(self.through[n] for n in self.front)
        fresh: list[int] = []
        for below in self.drawn(logits, self.front, most):
            count = self.through[below.node]
            nodes = self.add(below, 0, count)
            chains = below.ids[:count]
            self.through.update((n, chains.count(self.tokens[n])) for n in nodes)
            fresh += nodes
        self.front = [n for n in fresh if self.goes_on(n)]
