"""Several drafters' trees as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foretell.core.errors import InputError
from foretell.core.protocols import Budget, BuildContext, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.compose import Composed, drafts, fuse, rest


class Merge(Composed):
    """All parts draft (``of=A+B``), and their trees become one by longest common prefix: the union
    of the paths without duplicates, at most `nodes` nodes, earlier parts first (`compose.fuse`).

    Trees with q rows stay separate, ordered siblings with rows of their own, which a walk refuses
    one after the other. Papers: the merge of Quan et al., "RASD: Retrieval-Augmented Speculative
    Decoding" (2025). Promise: that of the weakest part.
    """

    name = "merge"
    paper = "RASD: Retrieval-Augmented Speculative Decoding"
    summary = "the trees of several drafters merged by prefix (of=A+B)"

    def __init__(self, parts: Sequence[Any], nodes: int = 32) -> None:
        super().__init__(parts)
        if nodes < 1:
            raise InputError(f"{self.name}:nodes is at least 1.")
        self.nodes = nodes
        self.shapes = (self.shapes - {"chain"}) | {"tree"}

    @classmethod
    def build(cls, context: BuildContext, of: str, nodes: int = 32) -> Merge:
        return cls(cls.make_parts(context, of), nodes)

    def propose(
        self, states: Sequence[Any], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        whole = [b.clamp(nodes=min(b.nodes, self.nodes), depth=b.depth) for b in budgets]
        found = self.ask(0, [s[0] for s in states], views, whole)
        for p in range(1, len(self.parts)):
            # a model with one branch at most keeps its first drafter's chain, or takes the next
            open_ = [
                i
                for i, (b, t) in enumerate(zip(whole, found, strict=True))
                if not rest(b, t).none and (b.branching > 1 or not drafts(t))
            ]
            if not open_:
                break
            trees = self.ask(
                p,
                [states[i][p] for i in open_],
                [views[i] for i in open_],
                [rest(whole[i], found[i]) for i in open_],
            )
            for i, tree in zip(open_, trees, strict=True):
                found[i] = fuse(found[i], tree, whole[i].nodes)
        return found
