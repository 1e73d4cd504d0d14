"""Graft: cut what is unlikely from a model's tree, and fill its place with retrieved tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from foretell.core.errors import InputError
from foretell.core.protocols import Budget, BuildContext, SeqView
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.compose import drafts, fuse, has_rows, model_and_table, only, values
from foretell.drafters.merge import Merge, MergeState


class Graft(Merge):
    """Prunes nodes of the draft model's tree whose path is less probable than `prune`, then fills
    up to `nodes` nodes with what a table finds behind the tree's own paths: first behind its
    leaves, then where something was pruned, then behind the text; likely paths first, at most
    `places` of them.

    A node drawn from q is never pruned, for its own probability would decide whether it stays;
    such a tree is only filled up, behind its drawn siblings, which may look at anything. So give
    it one-hot trees (``tree=eagle2``, the default) to prune. ``graft:store=FILE,model=DIR``, or
    ``of=MODEL+TABLE`` with a table that can look behind a path: `suffix` (the default, the text of
    the request) or `retrieval`.

    Paper: "Draft Less, Retrieve More: Hybrid Tree Construction for Speculative Decoding" (2026).
    Promise: that of the weaker part.
    """

    name = "graft"
    paper = "Draft Less, Retrieve More: Hybrid Tree Construction for Speculative Decoding"
    summary = "prune the draft model's tree, fill the freed places with retrieved tokens"

    def __init__(
        self, parts: Sequence[Any], nodes: int = 24, prune: float = 0.05, places: int = 4
    ) -> None:
        super().__init__(parts, nodes)
        if not 0 <= prune <= 1 or places < 1:
            raise InputError("graft needs prune within 0..1 and places >= 1.")
        if not hasattr(parts[1], "after"):
            raise InputError(
                f"graft looks tokens up behind drafted ones, which '{parts[1].name}' cannot: "
                "use suffix or retrieval."
            )
        self.prune, self.places = prune, places

    @classmethod
    def build(
        cls,
        context: BuildContext,
        of: str | None = None,
        nodes: int = 24,
        model: str | None = None,
        store: str | None = None,
        prune: float = 0.05,
        places: int = 4,
    ) -> Graft:
        return cls(model_and_table(context, of, model, store), nodes, prune, places)

    def propose(
        self, states: Sequence[MergeState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        whole = [b.clamp(nodes=self.nodes, depth=b.depth, branching=b.branching) for b in budgets]
        scored = [replace(v, plain=False) for v in views]  # an argmax alone has no probability
        trees = self.ask(0, [s.parts[0] for s in states], scored, whole)
        result = []
        for s, v, b, tree in zip(states, views, whole, trees, strict=True):
            s.first, cut = pruned(tree, self.prune)
            result.append(self._refill(s, v, b, s.first, cut))
        return result

    def _refill(
        self, state: MergeState, view: SeqView, budget: Budget, tree: TokenTree, cut: set[int]
    ) -> TokenTree:
        for node in slots(tree, cut, chain=budget.branching == 1)[: self.places]:
            path = tree.path(node)
            above = [1.0] * len(path) if tree.score is None else tree.score[path].tolist()
            room = budget.clamp(
                nodes=budget.nodes - drafts(tree),
                depth=budget.depth - len(path),
                branching=budget.branching,
            )
            if room.none:
                continue
            if budget.stop is not None:
                if path and budget.stop(above):
                    continue
                room = replace(room, stop=lambda own, a=above, s=budget.stop: s([*a, *own]))
            tokens = tree.tokens[path].tolist()
            if tokens:
                found = self.parts[1].after(state.parts[1], view, tokens, room)  # type: ignore[attr-defined]
            else:
                (found,) = self.ask(1, [state.parts[1]], [view], [room])
            tree = fuse(tree, behind(view.pending, tokens, above, found), budget.nodes)
        return tree


def pruned(tree: TokenTree, least: float) -> tuple[TokenTree, set[int]]:
    """A one-hot tree without the nodes whose path is less probable than `least`, and which nodes
    lost children; one with q rows as it is."""
    if has_rows(tree):
        return tree, set()
    keep = [v >= least for v in values(tree)]
    place = [sum(keep[:i]) for i in range(len(tree))]
    parents = tree.parent.tolist()
    cut = {place[parents[i]] for i in range(len(tree)) if not keep[i] and keep[parents[i]]}
    return only(tree, keep), cut


def slots(tree: TokenTree, cut: set[int], chain: bool = False) -> list[int]:
    """Where to graft: leaves, then nodes that lost children, then the tip; likely paths first. A
    chain has one place, its end."""
    if chain:
        return [len(tree) - 1]
    value, parents = values(tree), set(tree.parent.tolist())
    drafted = [i for i in range(tree.n_context, len(tree)) if tree.kind[i] == Kind.CANDIDATE]
    open_ = [i for i in drafted if i not in parents or i in cut]
    return [*sorted(open_, key=lambda i: (i in parents, -value[i], i)), tree.tip]


def behind(
    pending: Sequence[int], path: list[int], scores: list[float], found: TokenTree
) -> TokenTree:
    """The drafts of `found` below the chain `path`, all of it below `pending`."""
    n, c = len(path), found.n_context
    tokens = found.tokens[c:].tolist()
    parents = (found.parent[c:] - c + n).tolist()
    own = [1.0] * len(tokens) if found.score is None else found.score[c:].tolist()
    return TokenTree.build(
        pending, [*path, *tokens], [*range(-1, n - 1), *parents], score=[*scores, *own]
    )
