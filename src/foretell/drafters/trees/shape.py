"""The API of token trees: a shape decides where a draft grows, a drafter supplies distributions.

A drafter with logits of its own (a draft model, an early exit, heads) does this in every step:

    self.shape.plan(views)
    growers = [state.shape.grow(view, budget) for ...]   # state.shape = self.shape.bind(view)
    grow_level_by_level(growers, forward)                # drive.py; forward: frontiers -> logits
    trees = [g.tree() for g in growers]

and, when verdicts come back, ``state.shape.observe(feedback.tree, feedback.verdict)``. What
`forward` does is the drafter's business; `drive.Scratch` makes the segments where the rows of a
draft live in one open transaction. `make_shape` turns a drafter's ``tree=NAME,option=value`` keys
into a shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from foretell.core import registry
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, BuildContext, Draw, Promise, SeqView
from foretell.core.registry import Spec
from foretell.core.tree import TokenTree


class Grower(Protocol):
    """One draft of one sequence under construction; `growing.Growing` is a base for them.

    Two methods are optional, together: ``alone()`` and ``take(tokens, scores)``, of drafts that a
    model can grow without anybody looking at its rows (`chain.ChainGrower`)."""

    tokens: list[int]  # ids of the nodes so far; parents come before children
    paths: list[list[int]]  # for each node, the nodes from the tip's child down to it

    def frontier(self) -> list[int]:
        """Nodes whose rows are wanted next, -1 being the tip (wanted first, alone); [] = done.
        Nobody asks for a row twice."""
        ...

    def expand(self, logits: Tensor) -> None:
        """logits [k, V]: the drafter's RAW logits after each node of the frontier, in its order,
        in the target's vocabulary. The target's processors are applied in here."""
        ...

    def tree(self) -> TokenTree: ...


class TreeShape(Protocol):
    """A method of kind "tree" in the registry; its options are the keywords of its constructor (or
    of ``build(context, **options)``). `Shape` has the defaults of most of this."""

    name: str
    promise: Promise
    paper: str
    summary: str
    depth: int  # most levels
    holds: frozenset[str]  # what its trees may hold, as in `Drafter.shapes`
    draws: frozenset[Draw]  # ways of drawing it can do beyond TOP, NOISE and SAMPLE
    unsound: Mapping[Draw, str]  # ways of drawing under which it would bias the output -> why

    def bind(self, view: SeqView) -> TreeShape:
        """The shape for one sequence: itself, or one that learns from that sequence."""
        ...

    def plan(self, views: Sequence[SeqView]) -> None:
        """Told once a step, before any `grow`: the sequences that draft in it."""
        ...

    def grow(self, view: SeqView, budget: Budget) -> Grower:
        """A grower that keeps to the budget and to the shape's own limits."""
        ...

    def spent(self, forwards: int, seconds: float) -> None:
        """What the drafts of the planned sequences took."""
        ...

    def observe(self, tree: TokenTree, verdict: Verdict) -> None: ...


class Shape:
    """Defaults of a `TreeShape`: learns nothing, minds no cost, keeps the verifier's promise."""

    promise = Promise.EXACT
    depth = 8
    holds = frozenset({"tree", "onehot", "q"})
    draws = frozenset({Draw.IID, Draw.TOP_ONE})
    unsound: Mapping[Draw, str] = MappingProxyType({})

    def bind(self, view: SeqView) -> Any:
        return self

    def within(self, budget: Budget, nodes: int = 1 << 30) -> Budget:
        """The part of a budget that the shape may use."""
        return budget.clamp(nodes=nodes, depth=self.depth)

    def plan(self, views: Sequence[SeqView]) -> None:
        """Most shapes do not mind the company."""

    def spent(self, forwards: int, seconds: float) -> None:
        """Most shapes do not mind the cost."""

    def observe(self, tree: TokenTree, verdict: Verdict) -> None:
        """Most shapes learn nothing."""


def make_shape(context: BuildContext, name: str, options: Mapping[str, Any]) -> TreeShape:
    """The tree `name` with its options, as strings; InputError when either is wrong.

    A drafter takes the options as ``**options`` of its `build`: what it does not know itself is the
    tree's."""
    return registry.create("tree", Spec(name, dict(options)), context)
