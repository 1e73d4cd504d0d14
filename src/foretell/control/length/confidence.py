"""Stop drafting when the drafter doubts."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.control.length.fixed import UNLIMITED
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Load, SeqView, Timings
from foretell.core.tree import TokenTree


class Confidence:
    """Stop below a drafted token whose draft probability is under `threshold`; the token stays.

    Keeping it is what makes the rule lossless: only tokens that are already part of the draft are
    looked at. Drafters without scores are not affected. Source: the dynamic stop of transformers'
    assisted generation (`assistant_confidence_threshold`, default 0.4). Promise: keeps that of the
    verifier.
    """

    name = "confidence"
    paper = (
        "Dynamic Speculation Lookahead Accelerates Speculative Decoding of Large Language Models"
    )
    summary = "stop after a drafted token the drafter itself gave little probability"

    def __init__(self, threshold: float = 0.4, tokens: int = UNLIMITED) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(f"confidence:threshold={threshold} lies outside 0..1.")

        def doubt(scores: Sequence[float]) -> bool:
            return scores[-1] < threshold

        self._budget = Budget(UNLIMITED, tokens, stop=doubt)

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        return [self._budget] * len(views)

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        """The threshold is fixed."""
