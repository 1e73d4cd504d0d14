"""The tree with the most expected tokens per second on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from foretell.core.costs import GivenCosts
from foretell.core.errors import InputError
from foretell.core.protocols import Budget, BuildContext, CostModel, SeqView
from foretell.drafters.trees.options import numbers
from foretell.drafters.trees.sequoia import Learner, Sequoia
from foretell.drafters.trees.static import TemplateGrower

FALLBACK = 8  # nodes, where nothing is known about costs
PROBE = 32  # a sequence for which drafting does not pay tries again after so many steps


class Optimal(Sequoia):
    """Sequoia's tree, of the size and depth that maximise E[tokens] / (T_target + T_draft).

    For every depth l and every size n the dynamic programme says what the best tree is expected to
    emit; the cost model says what the target's forward over it takes for all sequences of the step,
    and l draft forwards take l times what they took lately. It may be no tree at all; then one is
    tried every 32 steps, so that acceptance goes on being learned.

    target: what a forward of 1, 2, 4, 8, .. rows takes, in any unit, instead of the measured costs,
    for example ``10/10/10/12/14/18``; draft: what a draft forward takes, in the same unit. With
    both, trees depend neither on the clock nor on the company, so that a seed means the same again
    under rejection, where with measured costs it does not.
    Paper: Chen et al., "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding" (2024).
    Promise: keeps that of the verifier.
    """

    name = "optimal"
    summary = "the tree, or none, with the most expected tokens per second on this machine"

    def __init__(
        self,
        cost: CostModel | None = None,
        nodes: int = 32,
        depth: int = 8,
        branching: int = 8,
        acceptance: str = "",
        draft: float | None = None,
        every: int = 32,
    ) -> None:
        super().__init__(nodes, depth, branching, acceptance, every)
        if cost is None:
            warnings.warn(
                f"tree=optimal knows no costs here, so it drafts trees of {min(FALLBACK, nodes)} "
                "nodes: give it target=.. and draft=..",
                stacklevel=2,
            )
        self.cost, self.measured = cost, draft is None
        self.given = isinstance(cost, GivenCosts) and draft is not None
        self.draft_seconds = draft or 0.0  # of one draft forward for all sequences
        self.sequences, self.context = 1, 0

    @classmethod
    def build(
        cls,
        context: BuildContext,
        nodes: int = 32,
        depth: int = 8,
        branching: int = 8,
        acceptance: str = "",
        target: str = "",
        draft: float | None = None,
        every: int = 32,
    ) -> Optimal:
        given = numbers(cls.name, "target", target) if target else []
        if not all(given):
            raise InputError(f"tree=optimal,target={target}: a forward takes more than no time.")
        cost = GivenCosts(given) if given else context.cost if context else None
        return cls(cost, nodes, depth, branching, acceptance, draft, every)

    def plan(self, views: Sequence[SeqView]) -> None:
        self.sequences = len(views)
        self.context = sum(v.cached for v in views)

    def spent(self, forwards: int, seconds: float) -> None:
        if self.measured and forwards:
            each = seconds / forwards
            old = self.draft_seconds
            self.draft_seconds = each if not old else old + 0.1 * (min(each, 4 * old) - old)

    def learner(self) -> SizedLearner:
        return SizedLearner(self)


class SizedLearner(Learner):
    """Chooses size and depth anew every few steps."""

    shape: Optimal

    def __init__(self, shape: Optimal) -> None:
        super().__init__(shape)
        self._choice: tuple[int, int] = (0, 0)  # nodes, depth
        self._key: tuple[int, ...] | None = None
        self._idle = 0  # steps without a draft

    def grow(self, view: SeqView, budget: Budget) -> TemplateGrower:
        shape = self.shape
        budget = shape.within(budget, shape.nodes)
        if shape.cost is None:
            return self.template(view, budget.clamp(nodes=FALLBACK, depth=shape.depth))
        company = (1, view.cached) if shape.given else (shape.sequences, shape.context)
        # costs move slowly: with the company, the context, and what the draft takes
        moved = round(8 * np.log2(shape.draft_seconds)) if shape.draft_seconds > 0 else -999
        key = (
            self.acceptance.seen // shape.every, company[0], company[1] // 256, moved,
            budget.nodes, budget.depth, budget.branching,
        )  # fmt: skip
        if key != self._key and not budget.none:
            self._key, self._choice = key, self.choose(budget, *company)
        nodes, depth = self._choice
        self._idle = 0 if nodes else self._idle + 1
        if self._idle >= PROBE:
            self._idle, nodes, depth = 0, FALLBACK, shape.depth
        return self.template(view, budget.clamp(nodes=nodes, depth=depth))

    def choose(self, budget: Budget, sequences: int = 1, context: int = 0) -> tuple[int, int]:
        """(nodes, depth) with the most expected tokens per second within the budget, in steps of so
        many sequences that hold so many committed rows in all."""
        shape, most = self.shape, budget.nodes
        assert shape.cost is not None, "asked only where there are costs"
        sizes = np.unique(np.round(np.geomspace(1, most, 24)).astype(int))
        rows = [sequences * (1 + int(n)) for n in sizes]
        costs = np.array([shape.cost.seconds(r, context, sequences) for r in rows])
        best = 1 / shape.cost.seconds(sequences, context, sequences)
        chosen = (0, 0)
        for depth in range(1, budget.depth + 1):
            tokens = self.plan_for(depth, budget.branching).tokens[sizes]
            rate = tokens / (costs + depth * shape.draft_seconds)
            i = int(rate.argmax())
            if rate[i] > best:
                best, chosen = float(rate[i]), (int(sizes[i]), depth)
        return chosen
