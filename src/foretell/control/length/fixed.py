"""Draft the same amount every step."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Load, SeqView, Timings
from foretell.core.tree import TokenTree

UNLIMITED = 1 << 30


class Fixed:
    """`tokens` levels a step (default: whatever the drafter is set to), at most `nodes` nodes.

    Paper: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023).
    Promise: keeps that of the verifier.
    """

    name = "fixed"
    paper = "Fast Inference from Transformers via Speculative Decoding"
    summary = "the same draft length every step"

    def __init__(self, tokens: int = UNLIMITED, nodes: int = UNLIMITED) -> None:
        self._budget = Budget(nodes, tokens, free=tokens == UNLIMITED)

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        return [self._budget] * len(views)

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        """A fixed length learns nothing."""
