"""The first drafter that has something to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foretell.core.protocols import Budget, BuildContext, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.compose import Composed, drafts


class Fallback(Composed):
    """Asks its parts in order (``of=A+B``); the first that drafts at least `least` tokens for a
    sequence drafts for it in this step, the others sleep. Put the cheap one first: a table that
    finds nothing costs microseconds. Where nobody drafts that much the longest draft is taken.

    Source: the cascades of llama.cpp ("draftless decoding has higher precedence") and the hybrid of
    Oliaro et al., "SuffixDecoding" (2024). Promise: that of the weakest part.
    """

    name = "fallback"
    paper = "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications"
    summary = "the first of several drafters that has something to say (of=A+B)"

    def __init__(self, parts: Sequence[Any], least: int = 1) -> None:
        super().__init__(parts)
        self.enough = max(1, least)

    @classmethod
    def build(cls, context: BuildContext, of: str, least: int = 1) -> Fallback:
        return cls(cls.make_parts(context, of), least)

    def propose(
        self, states: Sequence[Any], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        found: list[TokenTree] = [TokenTree.context(v.pending) for v in views]
        left = list(range(len(views)))
        for p in range(len(self.parts)):
            if not left:
                break
            trees = self.ask(
                p,
                [states[i][p] for i in left],
                [views[i] for i in left],
                [budgets[i] for i in left],
            )
            for i, tree in zip(left, trees, strict=True):
                if drafts(tree) > drafts(found[i]):
                    found[i] = tree
            left = [i for i in left if drafts(found[i]) < self.enough]
        return found
