"""Draft the next block while the target verifies the last one."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.control.length.fixed import UNLIMITED
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Load, SeqView, Timings
from foretell.core.tree import TokenTree


class Pearl:
    """Runs the pipelined loop (`engine.pipelined`): in every step the target verifies a block while
    the drafter, in a thread of its own, writes the block behind it.

    The block is as long as the drafter needs for one forward of the target: `tokens`, or, left out,
    the ratio of what a target forward and a draft level lately took, at most `most`. Needs a
    drafter that can go on from text that is not committed yet (draft-model), which drafts chains
    here; its own `tokens` is a limit, too.

    Paper: Liu et al., "PEARL: Parallel Speculative Decoding with Adaptive Draft Length" (2025).
    Promise: keeps that of the verifier.
    """

    name = "pearl"
    paper = "PEARL: Parallel Speculative Decoding with Adaptive Draft Length"
    summary = "draft the next block while the target verifies the last one"
    pipelined = True

    START, PACE = 4, 0.1

    def __init__(self, tokens: int | None = None, most: int = 16) -> None:
        if most < 1 or (tokens is not None and tokens < 1):
            raise InputError("pearl needs tokens >= 1 and most >= 1.")
        self.tokens, self.most = tokens, most
        self.level = self.target = 0.0  # seconds of a draft level, of a target forward

    @property
    def block(self) -> int:
        """Tokens of a block."""
        if self.tokens is not None:
            return self.tokens
        if not (self.level and self.target):
            return min(self.START, self.most)
        return min(self.most, max(1, round(self.target / self.level)))

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        return [Budget(UNLIMITED, self.block, branching=1)] * len(views)

    def drafted(self, levels: int, seconds: float) -> None:
        """Told after every block: how long it took, side by side with the target."""
        if levels > 0:
            self.level = self._mean(self.level, seconds / levels)

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        if timings.decoding:
            self.target = self._mean(self.target, timings.target)

    def _mean(self, old: float, new: float) -> float:
        return old + self.PACE * (min(new, 4 * old) - old) if old else new
