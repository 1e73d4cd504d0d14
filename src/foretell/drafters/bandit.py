"""Let the clock decide which drafter drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.arms import Arms
from foretell.drafters.compose import Composed

EAR = 8  # one step of so many of other parts' is told to a part that reads rows of logits
DWELL = 4  # steps an arm is played before its reward is read; the first pays for catching up
DEFAULT = "prompt-lookup+suffix+token-recycling+none"


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
    whether tokens are drawn or greedy) and shared by all requests of the class; a new class starts
    from what the most played one knows. ``rule=ucb`` or ``exp3``. Parts sleep while others play;
    those that learn from every step go on learning (from one in `EAR`, where that is dear). The
    choice looks at the past alone, so no promise is touched; under `rejection` the tokens of a seed
    depend on the draws and so on the clock, their law does not.

    The clock starts when a part is asked and stops when the step is over. In simulation (DWELL
    steps a pull, tests/unit/test_bandit.py) ucb loses 1 to 4 % against the best arm over the first
    200 pulls and at most 2.1 % against plain decoding over 1000 where all arms are useless. When
    the leader breaks down half of that is made up within 50 pulls and all within 75; that an arm
    has become good while another leads shows only when it is looked at, and 10 to 15 % are still
    lost after 75 to 150. exp3 assumes an adversary and loses 9 to 15 % over 200 pulls.

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
        self.heard = 0  # steps

    @classmethod
    def build(
        cls, context: BuildContext, of: str = DEFAULT, rule: str = "ucb", classes: bool = True
    ) -> Bandit:
        return cls(cls.make_parts(context, of), rule, classes)

    def begin(self, view: SeqView) -> BanditState:
        key = (view.draw, repetition(view.tokens[: view.prompt_len])) if self.classes else None
        if key not in self.known:
            played = max(self.known.values(), key=lambda arms: arms.pulls, default=None)
            self.known[key] = played.heir() if played else Arms(len(self.parts), self.rule)
        return BanditState(super().begin(view), self.known[key])

    def own(self, state: BanditState) -> list[Any]:
        return state.parts

    def drafted_by(self, state: BanditState, part: int) -> bool:
        return state.arm == part

    def spares(self, part: int) -> bool:
        return self.heard % EAR > 0 and getattr(self.parts[part], "may_miss", False)

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
        self.heard += 1
        super().observe(states, feedback)
        now = perf_counter()
        for s, f in zip(states, feedback, strict=True):
            if s.arm >= 0 and f.verdict.tokens and s.started:
                self._settle(s, len(f.verdict.tokens), now - s.started)
            s.started = 0.0  # a step that it slept through says nothing about an arm

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
