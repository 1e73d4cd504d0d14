"""Plain decoding."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, Needs, Promise, SeqView
from foretell.core.tree import TokenTree


class NoDrafter:
    """Drafts nothing: one token a step, the baseline that every other method is compared with."""

    name = "none"
    promise = Promise.EXACT
    reads_text = True
    paper = ""
    summary = "plain decoding, one token a step"
    needs = Needs()
    shapes: frozenset[str] = frozenset()

    def begin(self, view: SeqView) -> None:
        return None

    def propose(
        self, states: Sequence[None], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        return [TokenTree.context(v.pending) for v in views]

    def observe(self, states: Sequence[None], feedback: Sequence[Feedback]) -> None:
        """Nothing to learn."""

    def end(self, state: None) -> None:
        """Nothing to free."""
