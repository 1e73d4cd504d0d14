"""The first drafter that has something to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foretell.core.protocols import Budget, BuildContext, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.compose import Composed, has_rows


@dataclass(slots=True)
class FallbackState:
    """One sequence: its parts' states, and which of them made the last tree."""

    parts: list[Any]
    owner: int = -1


class Fallback(Composed):
    """Asks its parts in order (``of=A+B``); the first that drafts at least `least` tokens for a
    sequence drafts for it in this step, the others sleep. Put the cheap one first: a table that
    finds nothing costs microseconds. Where nobody drafts that much the longest draft is taken. A
    draft that was drawn from q stands whatever its length: where a doubtful token ends it early, to
    drop it for being short would be to drop it for what was drawn, and would bias the output.

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

    def begin(self, view: SeqView) -> FallbackState:
        return FallbackState(super().begin(view))

    def own(self, state: FallbackState) -> list[Any]:
        return state.parts

    def drafted_by(self, state: FallbackState, part: int) -> bool:
        return state.owner == part

    def propose(
        self, states: Sequence[FallbackState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        found = [TokenTree.context(v.pending) for v in views]
        left = list(range(len(views)))
        for s in states:
            s.owner = -1
        for p in range(len(self.parts)):
            if not left:
                break
            trees = self.ask(
                p,
                [states[i].parts[p] for i in left],
                [views[i] for i in left],
                [budgets[i] for i in left],
            )
            for i, tree in zip(left, trees, strict=True):
                if has_rows(tree) or tree.drafted > found[i].drafted:
                    found[i], states[i].owner = tree, p
            left = [i for i in left if found[i].drafted < self.enough and not has_rows(found[i])]
        return found
