"""RASD: a retrieved tree, pruned by what the draft model thinks, fused with the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from foretell.core.errors import InputError
from foretell.core.protocols import Budget, BuildContext, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.compose import drafts, fuse, model_and_table, only, rest
from foretell.drafters.merge import Merge, MergeState


class Rasd(Merge):
    """The draft model's tree and a retrieved one, fused by longest common prefix; the model's nodes
    first, the most frequent retrieved ones in what is left of `nodes`.

    A retrieved first token that is not among the `keep` most probable ones of the draft model, nor
    in the model's tree, is dropped with all that follows it. The retrieved tree is one-hot, and
    what is dropped of it depends on the text and on the model's distribution: the output keeps its
    law. ``rasd:store=FILE,model=DIR``, or ``of=MODEL+TABLE``; without a store the text itself and
    past outputs are searched (`suffix`).

    Paper: Quan et al., "RASD: Retrieval-Augmented Speculative Decoding" (2025).
    Promise: that of the weaker part.
    """

    name = "rasd"
    paper = "RASD: Retrieval-Augmented Speculative Decoding"
    summary = "a retrieved tree, pruned by the draft model, fused with the model's"

    def __init__(self, parts: Sequence[Any], nodes: int = 32, keep: int = 8) -> None:
        super().__init__(parts, nodes)
        if keep < 0:
            raise InputError("rasd:keep is at least 0.")
        self.keep = keep

    @classmethod
    def build(
        cls,
        context: BuildContext,
        of: str | None = None,
        nodes: int = 32,
        model: str | None = None,
        store: str | None = None,
        keep: int = 8,
    ) -> Rasd:
        return cls(model_and_table(context, of, model, store), nodes, keep)

    def propose(
        self, states: Sequence[MergeState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        whole = [b.clamp(nodes=self.nodes, depth=b.depth, branching=b.branching) for b in budgets]
        watched = [watch(v) for v in views]
        found = self.ask(0, [s.parts[0] for s in states], [v for v, _ in watched], whole)
        for s, tree in zip(states, found, strict=True):
            s.first = tree
        open_ = [
            i
            for i, (b, t) in enumerate(zip(whole, found, strict=True))
            if not rest(b, t).none and (b.branching > 1 or not drafts(t))
        ]
        tables = self.ask(
            1,
            [states[i].parts[1] for i in open_],
            [views[i] for i in open_],
            [whole[i] for i in open_],
        )
        for i, table in zip(open_, tables, strict=True):
            tree = found[i]
            known = {int(tree.tokens[n]) for n in tree.children(tree.tip)}
            table = relevant(table, watched[i][1], self.keep, known)
            found[i] = fuse(tree, table, whole[i].nodes)
        return found


def watch(view: SeqView) -> tuple[SeqView, list[Tensor]]:
    """A view that also writes down, in the list, the drafter's distribution [V] after the text."""
    seen: list[Tensor] = []

    def warp(logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        rows = view.warp(logits, paths)
        seen.extend(rows[i] for i, path in enumerate(paths) if not path)
        return rows

    return replace(view, warp=warp, plain=False), seen


def relevant(table: TokenTree, seen: list[Tensor], keep: int, known: set[int]) -> TokenTree:
    """A retrieved tree without the paths whose first token is neither among the `keep` most
    probable ones of ``seen[-1]`` [V] nor in `known`; all of it where the model said nothing."""
    if not seen or not drafts(table):
        return table
    likely = known | set(seen[-1].topk(min(keep, seen[-1].shape[-1])).indices.tolist())
    tip = table.tip
    pairs = zip(table.parent.tolist(), table.tokens.tolist(), strict=True)
    return only(table, [parent != tip or token in likely for parent, token in pairs])
