"""Several tables' drafts as one tree, cut to what pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from foretell.core.costs import paying
from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, CostModel, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.compose import Composed
from foretell.drafters.tables.pace import Pace, StepCosts
from foretell.drafters.tables.sharing import check_share, shares
from foretell.drafters.tables.sketch import Sketch, Sketches
from foretell.drafters.tables.trust import Trust
from foretell.drafters.tables.union import Union, judge, likeliest

FLOOR = 0.05  # without costs: the least probable path that is drafted
DEFAULT = "suffix+token-recycling"


@dataclass(slots=True)
class BlendState:
    """One sequence: its parts' states, whom it trusts, how quick it is, and this step: all that was
    proposed and the seconds it should take."""

    parts: list[Any]
    trust: Trust
    pace: Pace
    union: Union | None = None
    seconds: float = 0.0


class Blend(Composed):
    """All parts draft (``of=A+B``, or one, ``of=A``); of the union of their trees, prefixes shared,
    as many of the likeliest nodes are kept as are worth their seconds here (`tables.pace`).

    How likely a node is, is learnt from what came true: by which parts drafted it and what each
    said of it (its score, or its rank among its siblings), two that agree being a case of their
    own, and by level. What was not kept teaches as well: wherever the text went, it is known who
    had been right. So nothing has to be tried to be judged, and a part that is wrong in this text
    costs what its drafting takes and no rows. nodes: of the tree, at most. floor: keep the paths of
    at least this chance instead, whatever they cost; 0.05 where there is no cost model.

    The parts draft one-hot nodes; those with distributions (draft-model) belong into `merge`, for a
    drawn node is never dropped. Requests under a rejection rule learn for themselves (``share``,
    see `tables.sharing`), but without `floor` their tokens for a seed depend on the measured costs,
    so on the clock; their law does not.

    Papers: the prefix merge of Quan et al., "RASD: Retrieval-Augmented Speculative Decoding"
    (2025), with the size rule of Chen et al., "Sequoia" (2024), and probabilities learnt online.
    Promise: that of the weakest part.
    """

    name = "blend"
    paper = "RASD: Retrieval-Augmented Speculative Decoding"
    summary = "the likeliest nodes of one or several tables' trees, as many as pay (of=A+B)"
    least = 1

    def __init__(
        self,
        parts: Sequence[Any],
        nodes: int = 32,
        floor: float | None = None,
        share: str = "exact",
        cost: CostModel | None = None,
    ) -> None:
        super().__init__(parts)
        if nodes < 1 or not 0 <= (floor or 0) < 1:
            raise InputError("blend needs nodes >= 1 and a floor from 0 to below 1.")
        drawn = [p.name for p in parts if "q" in p.shapes]
        if drawn:
            raise InputError(
                f"blend drops nodes that do not pay, which '{drawn[0]}' may have drawn from a "
                "distribution: use merge:of=.. for it."
            )
        self.nodes, self.share = nodes, check_share(self.name, share)
        self.cost = cost if floor is None else None
        floor = FLOOR if floor is None else floor
        self._costs = StepCosts(self.cost, nodes, floor)
        self.clocked = self.clocked or self.cost is not None
        self.shapes = (self.shapes - {"chain"}) | {"tree"}
        self.may_miss = any(getattr(p, "may_miss", False) for p in parts)
        self.trust, self.pace = Trust(), Pace()

    @classmethod
    def build(
        cls,
        context: BuildContext,
        of: str = DEFAULT,
        nodes: int = 32,
        floor: float | None = None,
        share: str = "exact",
    ) -> Blend:
        return cls(cls.make_parts(context, of), nodes, floor, share, context.cost)

    def begin(self, view: SeqView) -> BlendState:
        together = shares(view, self.share)
        trust, pace = (self.trust, self.pace) if together else (Trust(), Pace())
        return BlendState(super().begin(view), trust, pace)

    def own(self, state: BlendState) -> list[Any]:
        return state.parts

    def propose(
        self, states: Sequence[BlendState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        start = perf_counter()
        for s in states:
            s.union = Union()
        for p in range(len(self.parts)):
            own = [s.parts[p] for s in states]
            for s, sketch in zip(states, self._sketch(p, own, views, budgets), strict=True):
                assert s.union is not None
                s.union.add(sketch, p, len(self.parts))
        found = [
            self._cut(s, v, b, len(views)) for s, v, b in zip(states, views, budgets, strict=True)
        ]
        took = perf_counter() - start
        for s in states:
            s.seconds += took
        return found

    def _sketch(
        self, part: int, states: Sequence[Any], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[Sketch]:
        drafter = self.parts[part]
        if isinstance(drafter, Sketches):  # no tree is made to be read again
            return drafter.sketch(states, views, budgets)
        return [Sketch.of(tree) for tree in self.ask(part, states, views, budgets)]

    def _cut(self, s: BlendState, view: SeqView, budget: Budget, sequences: int) -> TokenTree:
        union, costs = s.union, self._costs(view.cached, sequences)
        if union is None or not union.tokens:
            s.seconds = costs[0]
            return TokenTree.context(view.pending)
        own, paths = union.chances(s.trust)
        order = likeliest(paths, union.parents, budget.branching)
        likely = [paths[i] for i in order[: min(self.nodes, budget.nodes)]]
        n = paying(likely, costs, s.pace.rate if self.cost else 1.0)
        s.seconds = costs[n]
        if not n:
            return TokenTree.context(view.pending)
        kept = sorted(order[:n])
        tokens, parents, levels = union.tokens, union.parents, union.levels
        if kept[-1] == n - 1:  # the first ones, as of a chain
            return TokenTree.grown(view.pending, tokens[:n], parents[:n], levels[:n], own[:n])
        place = {-1: -1} | {node: i for i, node in enumerate(kept)}
        return TokenTree.grown(
            view.pending,
            [tokens[i] for i in kept],
            [place[parents[i]] for i in kept],
            [levels[i] for i in kept],
            [own[i] for i in kept],
        )

    def observe(self, states: Sequence[BlendState], feedback: Sequence[Feedback]) -> None:
        super().observe(states, feedback)
        for s, f in zip(states, feedback, strict=True):
            if s.union is not None and f.tokens:
                judge(s.union, f.tokens, s.trust)
                s.pace.took(len(f.tokens), s.seconds)
            s.union = None
