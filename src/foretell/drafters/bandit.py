"""Let the clock decide which drafter drafts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.compose import Composed

DWELL = 4  # steps an arm is played before its reward is read; the first pays for catching up
DEFAULT = "prompt-lookup+suffix+token-recycling+none"


@dataclass(slots=True)
class Arm:
    """What one drafter earned in one class of requests, discounted."""

    tokens: float = 0.0
    seconds: float = 0.0
    pulls: float = 0.0
    squares: float = 0.0  # of the deviations of a pull's rate from the mean, relative
    rested: int = 0  # pulls of others since it was last played
    weight: float = 0.0  # EXP3: log

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Arms:
    """The arms of one class of requests: a bandit for tokens per second.

    ucb: the highest mean rate plus a bonus that shrinks with the square root of the pulls. An arm
    whose optimistic rate is below the leader's is not played again until everybody has rested for
    `probe` pulls, so exploration costs a bounded share of the time. exp3: weights for the
    adversarial case, drawn in proportion.
    """

    count: int
    rule: str = "ucb"
    bonus: float = 0.35
    discount: float = 0.98
    probe: int = 64
    margin: float = 0.03
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    arms: list[Arm] = field(init=False)
    playing: int = 0

    def __post_init__(self) -> None:
        self.arms = [Arm() for _ in range(self.count)]

    def choose(self) -> int:
        fresh = [i for i, a in enumerate(self.arms) if a.pulls == 0]
        if fresh:
            self.playing = fresh[0]
        elif self.rule == "exp3":
            self.playing = self.dice.choices(range(self.count), self._shares())[0]
        else:
            self.playing = self._optimist()
        for i, a in enumerate(self.arms):
            a.rested = 0 if i == self.playing else a.rested + 1
        return self.playing

    def _optimist(self) -> int:
        best = max(range(self.count), key=lambda i: self.arms[i].rate)
        top = self.arms[best].rate
        # an arm that has rested long is looked at again, the less often the worse it was
        for i, a in enumerate(self.arms):
            gap = 1.0 - a.rate / top
            if i != best and a.rested > self.probe * (1 + 20 * gap):
                return i
        scores = [a.rate * (1 + self._width(a)) for a in self.arms]
        choice = max(range(self.count), key=lambda i: scores[i])
        if choice != best and self.arms[choice].pulls >= 3:
            near = self.arms[choice].rate > top * (1 - self.margin)
            return best if near else choice  # a tie is not worth switching for
        return choice

    def _width(self, a: Arm) -> float:
        spread = math.sqrt(a.squares / a.pulls) if a.pulls >= 2 else self.bonus
        return min(self.bonus, max(spread, 0.05)) / math.sqrt(a.pulls)

    def _shares(self) -> list[float]:
        top = max(a.weight for a in self.arms)
        powers = [math.exp(a.weight - top) for a in self.arms]
        total, mix = sum(powers), 0.05
        return [(1 - mix) * p / total + mix / self.count for p in powers]

    def reward(self, arm: int, tokens: int, seconds: float) -> None:
        """A pull of `arm` emitted `tokens` in `seconds`."""
        if seconds <= 0 or tokens <= 0:
            return
        a, rate = self.arms[arm], tokens / seconds
        if a.pulls:
            a.squares = self.discount * a.squares + (rate / a.rate - 1) ** 2
        a.tokens = self.discount * a.tokens + tokens
        a.seconds = self.discount * a.seconds + seconds
        a.pulls = self.discount * a.pulls + 1
        if self.rule == "exp3":
            share = self._shares()[arm]
            top = max(x.rate for x in self.arms)
            a.weight += 0.1 * min(1.0, rate / top) / share / self.count


@dataclass(slots=True)
class BanditState:
    """One sequence: its parts' states, the class it belongs to, and the pull under way."""

    parts: list[Any]
    arms: Arms
    arm: int = -1
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    started: float = 0.0


class Bandit(Composed):
    """Plays one of its parts at a time (``of=A+B+none``) and learns from the clock which of them
    emits most tokens per second, drafting, target and verification included.

    What was learned is kept by class of request (how much of the prompt repeats itself, and
    whether tokens are drawn or greedy) and shared by all requests of the class. ``rule=ucb`` or
    ``exp3``. Parts sleep while others play; those that learn from every step go on learning. The
    choice looks at the past alone, so no promise is touched; under `rejection` the tokens of a seed
    depend on the draws and so on the clock, their law does not.

    Paper: Hou et al., "BanditSpec: Adaptive Speculative Decoding via Bandit Algorithms" (2025).
    Promise: that of the weakest part.
    """

    name = "bandit"
    paper = "BanditSpec: Adaptive Speculative Decoding via Bandit Algorithms"
    clocked = True  # what it drafts depends on the time things take
    summary = "learns which of several drafters emits most tokens per second (of=A+B+none)"

    def __init__(self, parts: Sequence[Any], rule: str = "ucb", classes: bool = True) -> None:
        super().__init__(parts)
        if rule not in ("ucb", "exp3"):
            raise InputError(f"bandit:rule={rule} is neither 'ucb' nor 'exp3'.")
        self.rule, self.classes = rule, classes
        self.known: dict[Any, Arms] = {}

    @classmethod
    def build(
        cls, context: BuildContext, of: str = DEFAULT, rule: str = "ucb", classes: bool = True
    ) -> Bandit:
        return cls(cls.make_parts(context, of), rule, classes)

    def begin(self, view: SeqView) -> BanditState:
        key = (view.draw, repetition(view.tokens[: view.prompt_len])) if self.classes else None
        if key not in self.known:
            self.known[key] = Arms(len(self.parts), self.rule)
        return BanditState(super().begin(view), self.known[key])

    def end(self, state: BanditState) -> None:
        super().end(state.parts)

    def propose(
        self, states: Sequence[BanditState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        found: list[TokenTree | None] = [None] * len(views)
        for s in states:
            if s.arm < 0:
                s.arm, s.steps, s.tokens, s.seconds = s.arms.choose(), 0, 0, 0.0
        for p in range(len(self.parts)):
            mine = [i for i, s in enumerate(states) if s.arm == p]
            if mine:
                start = perf_counter()
                trees = self.ask(
                    p,
                    [states[i].parts[p] for i in mine],
                    [views[i] for i in mine],
                    [budgets[i] for i in mine],
                )
                for i, tree in zip(mine, trees, strict=True):
                    found[i], states[i].started = tree, start
        return [t for t in found if t is not None]

    def observe(self, states: Sequence[BanditState], feedback: Sequence[Feedback]) -> None:
        for p, part in enumerate(self.parts):
            selfish = getattr(part, "own_trees_only", False)
            mine = [i for i, s in enumerate(states) if not selfish or s.arm == p]
            if mine:
                part.observe([states[i].parts[p] for i in mine], [feedback[i] for i in mine])
        now = perf_counter()
        for s, f in zip(states, feedback, strict=True):
            if s.arm >= 0 and f.verdict.tokens:
                self._settle(s, len(f.verdict.tokens), now - s.started)

    def _settle(self, s: BanditState, tokens: int, seconds: float) -> None:
        s.steps += 1
        if s.steps > 1 or s.arms.arms[s.arm].pulls:
            s.tokens, s.seconds = s.tokens + tokens, s.seconds + seconds
        if s.steps >= DWELL:
            s.arms.reward(s.arm, s.tokens, s.seconds)
            s.arm = -1


def repetition(tokens: Sequence[int]) -> int:
    """How much of a prompt repeats itself, in four steps: the share of its pairs of neighbours that
    stood before."""
    last = list(tokens[-1024:])
    pairs = list(pairwise(last))
    share = 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
    return 0 if share < 0.1 else 1 if share < 0.25 else 2 if share < 0.5 else 3
