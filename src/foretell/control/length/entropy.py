"""Stop drafting where the drafter's distribution says that it does not know."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foretell.control.length.company import decided, learner
from foretell.control.length.fixed import UNLIMITED
from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Draw, Load, SeqView, Timings
from foretell.core.tree import TokenTree


class Bar:
    """The bound that a draft has to reach, moved by how many drafts are accepted (AdaEDL)."""

    FADE, SLOW, STEP, WANTED = 0.5, 0.9, 0.01, 0.9

    def __init__(self, value: float) -> None:
        self.value, self.accepted = value, self.WANTED

    def observe(self, drafted: int, accepted: int) -> None:
        self.accepted = self.FADE * self.accepted + (1 - self.FADE) * accepted / drafted
        goal = self.value
        if self.accepted < self.WANTED:
            goal += self.STEP
        elif accepted == drafted:
            goal -= self.STEP
        self.value = min(1.0, max(0.0, self.SLOW * self.value + (1 - self.SLOW) * goal))


def bound(entropy: float, gamma: float) -> float:
    """A lower bound on the chance that a draft is accepted: 1 - sqrt(gamma H), H in nats."""
    return 1 - math.sqrt(gamma * max(entropy, 0.0))


class Entropy:
    """Draft nothing below a token that was taken from a distribution of so high an entropy H that
    1 - sqrt(gamma H) < `threshold`; the token itself stays.

    The entropy is known before the token is drawn and says nothing about which one it was, and the
    token stays, so the rule is lossless. With adapt=true the threshold moves with the verdicts, as
    the paper has it: up while fewer than 0.9 of the drafts are accepted, down after a draft that is
    accepted as a whole. That suits pairs that agree well; where they do not it ends at one token a
    draft, so it is off unless asked for. It is learned by all sequences together where drafts never
    change the output, and by each alone under rejection. Drafters without distributions (copies of
    text, tables) are not affected.

    Paper: Agrawal et al., "AdaEDL: Early Draft Stopping for Speculative Decoding of Large Language
    Models via an Entropy-based Lower Bound on Token Acceptance Probability" (2024). Promise: keeps
    that of the verifier.
    """

    name = "entropy"
    paper = (
        "AdaEDL: Early Draft Stopping for Speculative Decoding of Large Language Models via an "
        "Entropy-based Lower Bound on Token Acceptance Probability"
    )
    summary = "stop after a token that was taken from a draft distribution of high entropy"

    def __init__(
        self,
        threshold: float = 0.5,
        gamma: float = 0.2,
        adapt: bool = False,
        tokens: int = UNLIMITED,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise InputError(f"entropy:threshold={threshold} lies outside 0..1.")
        if gamma <= 0:
            raise InputError(f"entropy:gamma={gamma} makes no sense: it is above 0.")
        self.threshold, self.gamma, self.adapt, self.tokens = threshold, gamma, adapt, tokens
        self.shared: dict[Draw, Bar] = {}
        self.views: list[SeqView] = []

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        self.views = list(views)
        return [self._budget(self._bar(v)) for v in views]

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None:
        if not self.adapt:
            return
        for view, tree, verdict in decided(self.views, trees, verdicts):
            levels = deepest(tree)
            if levels:
                self._bar(view).observe(levels, verdict.accepted)

    def _bar(self, view: SeqView) -> Bar:
        return learner(view, self.shared, lambda: Bar(self.threshold))

    def _budget(self, bar: Bar) -> Budget:
        value, gamma = bar.value, self.gamma
        return Budget(UNLIMITED, self.tokens, unsure=lambda h: bound(h[-1], gamma) < value)


def deepest(tree: TokenTree) -> int:
    """Drafted levels."""
    return int(tree.depth.max() - tree.depth[tree.tip]) if tree.drafted else 0
