"""Several drafters' trees as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback, Verdict
from foretell.core.protocols import Budget, BuildContext, Draw, SeqView
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.compose import Composed, drafts, fuse, rest


@dataclass(slots=True)
class MergeState:
    """One sequence: its parts' states, and the tree of the first of them in this step."""

    parts: list[Any]
    first: TokenTree | None = None


class Merge(Composed):
    """All parts draft (``of=A+B``), and their trees become one by longest common prefix: the union
    of the paths without duplicates, at most `nodes` nodes, earlier parts first (`compose.fuse`).

    Trees with q rows stay separate, ordered siblings with rows of their own, which a walk refuses
    one after the other. The first part also hears what became of its own tree.

    Papers: the merge of Quan et al., "RASD: Retrieval-Augmented Speculative Decoding" (2025).
    Promise: that of the weakest part.
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
        # rules for k draws from one q, or for whole chains, see siblings of two origins
        self.draws = self.draws & {Draw.IID}

    @classmethod
    def build(cls, context: BuildContext, of: str, nodes: int = 32) -> Merge:
        return cls(cls.make_parts(context, of), nodes)

    def begin(self, view: SeqView) -> MergeState:
        return MergeState(super().begin(view))

    def own(self, state: MergeState) -> list[Any]:
        return state.parts

    def observe(self, states: Sequence[MergeState], feedback: Sequence[Feedback]) -> None:
        super().observe(states, feedback)
        if getattr(self.parts[0], "own_trees_only", False):
            own = [alone(f, s.first) for s, f in zip(states, feedback, strict=True)]
            self.parts[0].observe([s.parts[0] for s in states], own)
        for s in states:
            s.first = None

    def propose(
        self, states: Sequence[MergeState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        whole = [b.clamp(nodes=self.nodes, depth=b.depth, branching=b.branching) for b in budgets]
        found = self.ask(0, [s.parts[0] for s in states], views, whole)
        for s, tree in zip(states, found, strict=True):
            s.first = tree
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
                [states[i].parts[p] for i in open_],
                [views[i] for i in open_],
                [rest(whole[i], found[i]) for i in open_],
            )
            for i, tree in zip(open_, trees, strict=True):
                found[i] = fuse(found[i], tree, whole[i].nodes)
        return found


def alone(feedback: Feedback, first: TokenTree | None) -> Feedback:
    """What the verdict on a fused tree says of `first`, whose nodes come first in it: where the
    accepted path leaves it, its own tokens were refused."""
    if first is None or len(first) == len(feedback.tree):
        return feedback
    first.kill(feedback.tree.kind[: len(first)] == Kind.DEAD)  # what a grammar forbade
    path = [n for n in feedback.verdict.path if n < len(first)]  # parents come first: a prefix
    tip = path[-1] if path else first.tip
    checked = min(feedback.verdict.checked, len(path) + bool(first.children(tip)))
    verdict = Verdict(path, feedback.verdict.tokens[: len(path) + 1], checked)
    return replace(feedback, tree=first, verdict=verdict, path=[*range(first.n_context), *path])
