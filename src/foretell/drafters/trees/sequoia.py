"""Sequoia: the best fixed tree for the acceptance that is measured."""

from __future__ import annotations

from typing import Any

from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.trees.acceptance import Acceptance, hazards
from foretell.drafters.trees.options import at_least_one, numbers
from foretell.drafters.trees.plan import Path, Plan
from foretell.drafters.trees.shape import Shape
from foretell.drafters.trees.static import TemplateGrower, fit

PRIOR = [0.55, 0.15, 0.06, 0.035, 0.025, 0.02, 0.015, 0.01]


class Sequoia(Shape):
    """The tree of `nodes` nodes that is expected to emit the most tokens, by dynamic programming.

    acceptance: the probability that the child of rank 0, 1, .. is the one accepted, for example
    ``0.6/0.2/0.1``. Without it, it is learned from the verdicts, level by level and rank by rank,
    and the tree is planned anew every `every` of them. What is learned is kept apart for greedy
    decoding and replay, where trees never change the output, and shared by all sequences; under
    rejection every sequence learns for itself, so that its seed means the same in any company.

    Paper: Chen et al., "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding" (2024).
    Promise: keeps that of the verifier.
    """

    name = "sequoia"
    paper = "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding"
    summary = "the fixed tree with the most expected tokens for the acceptance seen so far"

    def __init__(
        self,
        nodes: int = 16,
        depth: int = 8,
        branching: int = 8,
        acceptance: str = "",
        every: int = 32,
    ) -> None:
        at_least_one(self.name, nodes=nodes, depth=depth, branching=branching, every=every)
        self.nodes, self.depth, self.branching, self.every = nodes, depth, branching, every
        given = numbers(self.name, "acceptance", acceptance, 1.0) if acceptance else []
        self.learns = not given
        rates = (given or PRIOR)[:branching]
        self.prior = hazards(rates)
        self.shared: dict[Draw, Learner] = {}

    def bind(self, view: SeqView) -> Learner:
        if view.draw.from_q:
            return self.learner()
        return self.shared.setdefault(view.draw, self.learner())

    def learner(self) -> Learner:
        return Learner(self)

    def grow(self, view: SeqView, budget: Budget) -> TemplateGrower:
        return self.bind(view).grow(view, budget)


class Learner(Shape):
    """A Sequoia tree and the acceptance it is planned for."""

    def __init__(self, shape: Any) -> None:
        self.shape, self.depth, self.holds = shape, shape.depth, shape.holds
        self.acceptance = Acceptance(shape.prior, shape.depth)
        self._plans: dict[tuple[int, int], Plan] = {}  # by depth and branching
        self._trees: dict[tuple[int, int, int], dict[Path, int]] = {}

    def plan_for(self, depth: int, branching: int) -> Plan:
        """The plan of trees so deep and so wide (clamped to the shape's own limits)."""
        key = min(depth, self.shape.depth), min(branching, len(self.shape.prior))
        if key not in self._plans:
            rates = self.acceptance.rates()[: key[0], : key[1]]
            self._plans[key] = Plan(rates, self.shape.nodes)
        return self._plans[key]

    def grow(self, view: SeqView, budget: Budget) -> TemplateGrower:
        return self.template(view, self.shape.within(budget, self.shape.nodes))

    def template(self, view: SeqView, budget: Budget) -> TemplateGrower:
        """The best tree within a budget that is not larger than the shape."""
        key = budget.nodes, budget.depth, budget.branching
        if budget.none:
            return TemplateGrower(view, budget, {})
        if key not in self._trees:
            plan = self.plan_for(budget.depth, budget.branching)
            self._trees[key] = fit(plan.tree(budget.nodes), budget)
        return TemplateGrower(view, budget, self._trees[key])

    def observe(self, tree: TokenTree, verdict: Verdict) -> None:
        if not self.shape.learns:
            return
        self.acceptance.observe(tree, verdict)
        if self.acceptance.seen % self.shape.every == 0:
            self._plans.clear()
            self._trees.clear()
