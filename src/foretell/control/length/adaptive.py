"""Draft about as much as was lately accepted."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.control.length.company import decided
from foretell.control.length.entropy import deepest
from foretell.control.length.fixed import UNLIMITED
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Load, SeqView, Timings
from foretell.core.tree import TokenTree


class Pace:
    """The draft length of one sequence, from running means of what was drafted and accepted."""

    def __init__(self, start: int) -> None:
        self.length = start
        self.drafted = self.accepted = float(start)

    def observe(self, drafted: int, accepted: int, rule: Adaptive) -> None:
        """drafted: levels the drafter brought (it may have ended early); accepted: of those."""
        self.drafted += rule.rate * (drafted - self.drafted)
        self.accepted += rule.rate * (accepted - self.accepted)
        if self.accepted >= rule.saturated * self.drafted:
            goal = round(self.drafted) + rule.step  # the length, not the drafter, was the limit
        else:
            goal = round(self.accepted) + rule.slack
        self.length = min(rule.tokens, max(rule.least, goal))


class Adaptive:
    """Every sequence drafts the running mean of what was accepted lately plus `slack`; while nearly
    everything is accepted, `step` more than what is drafted.

    Two running means, of weight `rate`, are kept per sequence: the levels the drafter brought and
    the levels accepted. Where the second reaches `saturated` of the first the draft grows. Made for
    drafters of whole blocks, whose long drafts cost as much as short ones, and good for all that
    have no score. DiffuSpec's own rule takes the mean of the generated length as the base, which
    presumes a drafter that ends its drafts itself; the accepted length here does not. A length
    depends on the sequence's own past only, so that the rule is lossless, and a seed means the same
    in any company.

    Paper: Li et al., "DiffuSpec: Unlocking Diffusion Language Models for Speculative Decoding"
    (2025). Promise: keeps that of the verifier.
    """

    name = "adaptive"
    paper = "DiffuSpec: Unlocking Diffusion Language Models for Speculative Decoding"
    summary = "as many levels as were lately accepted, and some more while all are"

    def __init__(
        self,
        tokens: int = 32,
        least: int = 1,
        start: int = 4,
        step: int = 2,
        slack: int = 1,
        rate: float = 0.3,
        saturated: float = 0.9,
    ) -> None:
        if not 1 <= least <= start <= tokens:
            raise InputError("adaptive needs 1 <= least <= start <= tokens.")
        if step < 1 or slack < 0:
            raise InputError("adaptive needs step >= 1 and slack >= 0.")
        if not (0 < rate <= 1 and 0 < saturated <= 1):
            raise InputError("adaptive needs rate and saturated above 0 and at most 1.")
        self.tokens, self.least, self.start = tokens, least, start
        self.step, self.slack, self.rate, self.saturated = step, slack, rate, saturated
        self.views: list[SeqView] = []

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        self.views = list(views)
        return [Budget(UNLIMITED, self._pace(v).length) for v in views]

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        for view, tree, verdict in decided(self.views, trees, verdicts):
            levels = deepest(tree)
            if levels:
                self._pace(view).observe(levels, verdict.accepted, self)

    def _pace(self, view: SeqView) -> Pace:
        if view.effort is None:
            view.effort = Pace(self.start)
        return view.effort
