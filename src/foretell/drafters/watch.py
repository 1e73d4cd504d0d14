"""Choosing among drafters by what each would have got: paired looks instead of pulls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foretell.core.tree import Kind, TokenTree

EAGER = 8  # looks before looking is paid for
SHARE = 0.015  # of the time decoded, what looking may take
MEMORY = 32.0  # looks that count; older ones fade
MARGIN = 0.03  # by how much another has to be better
SLOW = 0.1  # weight of the last step in what a drafter's steps take beyond the model of them
FORGET = 0.03  # of what was found out so about a drafter that plays no more, at every look


@dataclass(frozen=True, slots=True)
class Look:
    """All drafters' trees at one place of the text: `at` committed tokens were known, and the tree
    of `player` was verified."""

    at: int
    player: int
    trees: list[TokenTree]
    seconds: list[float]  # of a step with each of them, as far as known: drafting and the forward


def got(tree: TokenTree, tokens: Sequence[int]) -> int:
    """How many tokens a step with this one-hot tree emits where the text goes on with `tokens`:
    those of its path, and one. 0: that cannot be told yet, for the text is not far enough."""
    node, emitted = tree.tip, 1
    for token in tokens:
        below = [c for c in tree.children(node) if tree.kind[c] == Kind.CANDIDATE]
        node = next((c for c in below if tree.tokens[c] == token), -1)
        if node < 0:
            return emitted
        emitted += 1
    return 0 if any(tree.kind[c] == Kind.CANDIDATE for c in tree.children(node)) else emitted


@dataclass(slots=True)
class Watch:
    """What each of `count` drafters would have got in one class of requests.

    A look asks all of them at one place and judges their drafts by the text that came, so they are
    compared on the same places of the same texts, whoever drafted there, and no step is spent on a
    drafter to get to know it. The places are where the player's steps began; each stands for as
    much of the text as its step went over, and on that a drafter that gets g tokens a step of s
    seconds takes s / g for each. (Tokens a step alone would flatter whoever drafts more than the
    player, whose many short steps begin in the midst of what the other copies at once. What is
    left: near the end of a copy a long draft is judged again and again with little to get, which
    its own steps would seldom meet; where copies are two drafts long it looks a third slower than
    it is.)
    What a step takes is modelled (its drafting, measured, and the forward by the cost model); how
    far that is off is learnt of every drafter when it plays.

    The first `EAGER` looks follow one another; later ones are paid from `SHARE` of the time.
    """

    count: int
    tokens: list[float] = field(init=False)
    seconds: list[float] = field(init=False)
    off: list[float] = field(init=False)  # measured over modelled seconds of its steps
    steps: list[int] = field(init=False)  # that it played
    looks: int = 0
    judged: int = 0
    leader: int = 0
    credit: float = 0.0  # seconds that looking may take

    def __post_init__(self) -> None:
        self.tokens, self.seconds = [0.0] * self.count, [0.0] * self.count
        self.off, self.steps = [1.0] * self.count, [0] * self.count

    def heir(self) -> Watch:
        """For another class: what is known here is the first guess there, to be looked over."""
        new = Watch(self.count)
        weight = min(1.0, EAGER / 2 / max(1, self.looks))
        new.tokens = [weight * t for t in self.tokens]
        new.seconds = [weight * s for s in self.seconds]
        new.off, new.steps, new.leader = list(self.off), list(self.steps), self.leader
        new.looks, new.judged = min(self.looks, EAGER // 2), self.judged
        return new

    @property
    def due(self) -> bool:
        return self.looks < EAGER or self.credit > 0

    def rate(self, i: int) -> float:
        """Tokens per second that are expected of a drafter."""
        return self.tokens[i] / (self.seconds[i] * self.off[i]) if self.seconds[i] else 0.0

    def choose(self) -> int:
        best = max(range(self.count), key=self.rate)
        if self.judged < EAGER // 2:  # too little to leave the first for
            best = self.leader
        if self.rate(best) > (1 + MARGIN) * self.rate(self.leader):
            self.leader = best
        return self.leader

    def looked(self, seconds: float) -> None:
        """Asking those that did not draft took so long."""
        self.looks += 1
        if self.looks > EAGER:
            self.credit -= seconds

    def saw(self, look: Look, tokens: Sequence[int]) -> bool:
        """A look whose text went on with `tokens`; False if it cannot be judged yet."""
        each = [got(tree, tokens) for tree in look.trees]
        if not all(each):
            return False
        self.judged += 1
        keep, span = 1 - 1 / MEMORY, each[look.player]
        for i, (many, seconds) in enumerate(zip(each, look.seconds, strict=True)):
            self.tokens[i] = keep * self.tokens[i] + span
            self.seconds[i] = keep * self.seconds[i] + seconds * span / many
            if i != self.leader:  # what was measured once may have been an accident
                self.off[i] += FORGET * (1.0 - self.off[i])
        return True

    def took(self, arm: int, modelled: float, seconds: float, awake: bool = True) -> None:
        """A step without a look that `arm` played took so long; not `awake`: after a sleep, from
        which it had to catch up."""
        self.credit = min(self.credit + SHARE * seconds, seconds)
        if not awake:
            return
        self.steps[arm] += 1
        new = min(2.0, max(0.5, seconds / modelled))
        self.off[arm] += max(SLOW, 1 / self.steps[arm]) * (new - self.off[arm])
