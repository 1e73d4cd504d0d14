"""Growing a tree child by child, the most promising first."""

from __future__ import annotations

import heapq

from torch import Tensor

from foretell.core.protocols import Budget, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.trees.calibration import Calibration
from foretell.drafters.trees.growing import Drawn, Growing


class GreedyGrower(Growing):
    """A heap of slots, a slot being the place of the next child below a node."""

    def __init__(
        self,
        view: SeqView,
        budget: Budget,
        path: bool,
        floor: float | None,
        ahead: int,
        calibration: Calibration | None,
    ) -> None:
        super().__init__(view, budget)
        self.path, self.floor, self.ahead, self.calibration = path, floor, ahead, calibration
        self.width = max(1, min(budget.nodes, budget.branching))
        self.below: dict[int, Drawn] = {}  # of the nodes whose rows are known
        self.mass = {-1: 1.0}  # estimated probability that verification arrives at a node
        self.shares: list[float] = []  # of each node: its part of what its elder siblings left of q
        self.heap: list[tuple[float, int, int, int, float, float]] = []
        """(-value, age, node, which child, probability that verification tries it, what the elder
        siblings left of q); child -1: the node's row is not known yet."""
        self.age = 0
        self.front: list[int] = [] if budget.none else [-1]
        self.made: TokenTree | None = None
        if self.front:
            self._push(1.0, -1, -1, 1.0, 1.0)

    def frontier(self) -> list[int]:
        return self.front

    def expand(self, logits: Tensor) -> None:
        for below in self.drawn(logits, self.front, self.width):
            self.below[below.node] = below
        self.front, waiting = [], []
        while self.heap and self.room > 0:
            value, _, node, child, reach, left = self.heap[0]
            if self.floor is not None and -value <= self.floor and self.tokens:
                break
            if child < 0 and node not in self.below:
                if self.floor is None:
                    self.front = self._unknown()
                    return
                waiting.append(heapq.heappop(self.heap))  # its turn comes with the next level
                continue
            heapq.heappop(self.heap)
            if child < 0:
                self._slot(node, 0, self.mass[node], 1.0)
            else:
                self._take(node, child, reach, left)
        if self.room > 0:
            self.front = sorted(w[2] for w in waiting)
            for entry in waiting:
                heapq.heappush(self.heap, entry)

    def _take(self, node: int, child: int, reach: float, left: float) -> None:
        """Keep the child; open the slot beside it and the one below it."""
        below = self.below[node]
        (fresh,) = self.add(below, child, child + 1)
        weight = below.weight[child]
        self.shares.append(min(1.0, weight / max(left, 1e-9)))
        repeat = fresh in self.dead
        chance = 0.0 if repeat else self._chance(child, self.shares[-1])
        self._slot(node, child + 1, reach * (1 - chance), left if repeat else left - weight)
        if self.goes_on(fresh):
            self.mass[fresh] = reach * chance
            bound = self._ahead_of_draw(0, reach * chance)
            self._push(bound, fresh, -1, reach * chance, 1.0)

    def _slot(self, node: int, child: int, reach: float, left: float) -> None:
        below = self.below[node]
        if child >= len(below.ids):
            return
        if self.path:
            share = below.weight[child] / max(left, 1e-9)
            value = reach * self._chance(child, min(1.0, share))
        else:
            value = self._ahead_of_draw(child, reach)
        self._push(value, node, child, reach, left)

    def _chance(self, rank: int, share: float) -> float:
        return share if self.calibration is None else self.calibration.chance(rank, share)

    def _ahead_of_draw(self, rank: int, reach: float) -> float:
        """The value of a slot whose token nobody knows."""
        if self.path or self.calibration is None:
            return max(reach, 0.0)
        return reach * self.calibration.mean(rank)

    def _push(self, value: float, node: int, child: int, reach: float, left: float) -> None:
        self.age += 1
        heapq.heappush(self.heap, (-value, self.age, node, child, reach, left))

    def _unknown(self) -> list[int]:
        """The best nodes whose rows are not known."""
        waiting = (e for e in self.heap if e[3] < 0 and e[2] not in self.below)
        return [e[2] for e in heapq.nsmallest(min(self.ahead, self.room), waiting)]

    def tree(self) -> TokenTree:
        self.made = super().tree()
        return self.made
