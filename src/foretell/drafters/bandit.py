"""Let the clock decide which drafter drafts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, CostModel, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.compose import Composed
from foretell.drafters.looks import Looks
from foretell.drafters.pulls import Pulls

EAR = 16  # one step of so many of other parts' is told to a part that reads rows of logits
RULES = ("watch", "ucb", "exp3")
DEFAULT = "blend(of=suffix)+blend+none"


class Player(Protocol):
    """How a bandit learns which part is best; `play` is what it keeps of one sequence."""

    def begin(self, key: Hashable, view: SeqView, states: list[Any]) -> Any:
        """A sequence of the class `key`, and its parts' states."""

    def choose(self, play: Any) -> int:
        """The part that drafts in this step."""
        ...

    def drafted(
        self,
        play: Any,
        view: SeqView,
        budget: Budget,
        tree: TokenTree,
        seconds: float,
        sequences: int,
    ) -> None:
        """The part's draft, and how long it took."""

    def walking(self, play: Any) -> bool:
        """Whether it is the player who tells the other parts of this step."""
        ...

    def over(self, play: Any, f: Feedback, seconds: float, alone: bool) -> None:
        """What the step brought, and how long it took, 0 where no part was asked; alone: no other
        sequence was in it."""

    def end(self, play: Any) -> None:
        """The sequence is over."""


@dataclass(slots=True)
class BanditState:
    """One sequence: its parts' states, what the player keeps of it, and who drafts."""

    parts: list[Any]
    play: Any
    part: int = -1
    started: float = 0.0


class Bandit(Composed):
    """Lets one of its parts draft at a time (``of=A+B+none``): the one that makes most tokens per
    second, drafting, target and verification included.

    rule=``watch`` (default, where no part draws from a q): now and then all parts walk over the
    same text, and what came tells what each would have got there (`looks.Looks`). No step is spent
    on trying. ``ucb`` or ``exp3``: a part's worth is seen only by playing it, some steps at
    a time (`pulls.Pulls`).

    What was learned is kept by class of request (how much of the prompt repeats itself, and whether
    tokens are drawn or greedy) and shared by all requests of the class; a new class starts from
    what the best known one says. Parts sleep while others play; those that learn from every step go
    on learning (from one in `EAR`, where that is dear). The choice looks at the past alone, so no
    promise is touched; under `rejection` the tokens of a seed depend on the draws and so on the
    clock, their law does not.

    Paper: Hou et al., "BanditSpec: Adaptive Speculative Decoding via Bandit Algorithms" (2025).
    Promise: that of the weakest part.
    """

    name = "bandit"
    paper = "BanditSpec: Adaptive Speculative Decoding via Bandit Algorithms"
    clocked = True  # what it drafts depends on the time things take
    summary = "learns which of several drafters emits most tokens per second (of=A+B+none)"

    def __init__(
        self,
        parts: Sequence[Any],
        rule: str = "",
        classes: bool = True,
        cost: CostModel | None = None,
    ) -> None:
        super().__init__(parts)
        apart = any("q" in p.shapes or getattr(p, "own_trees_only", False) for p in parts)
        rule = rule or ("ucb" if apart or cost is None else "watch")
        if rule not in RULES:
            raise InputError(f"bandit:rule={rule} is none of {', '.join(RULES)}.")
        self.rule, self.classes = rule, classes
        self.heard = 0  # steps
        self.player: Player
        if rule != "watch":
            self.player = Pulls(len(parts), rule)
        elif apart or cost is None:
            raise InputError(
                "bandit:rule=watch judges drafts that were not verified, which needs a cost model "
                "and parts that draw nothing: use rule=ucb."
            )
        else:
            self.player = Looks(parts, cost, self._ask_one)

    @classmethod
    def build(
        cls, context: BuildContext, of: str = DEFAULT, rule: str = "", classes: bool = True
    ) -> Bandit:
        return cls(cls.make_parts(context, of), rule, classes, context.cost)

    def begin(self, view: SeqView) -> BanditState:
        key = (view.draw, repetition(view.tokens[: view.prompt_len])) if self.classes else None
        parts = super().begin(view)
        return BanditState(parts, self.player.begin(key, view, parts))

    def end(self, state: BanditState) -> None:
        self.player.end(state.play)
        super().end(state)

    def own(self, state: BanditState) -> list[Any]:
        return state.parts

    def drafted_by(self, state: BanditState, part: int) -> bool:
        return state.part == part

    def hears(self, state: BanditState, part: int) -> bool:
        if self.drafted_by(state, part):
            return True
        spared = self.heard % EAR > 0 and getattr(self.parts[part], "may_miss", False)
        return not spared and not self.player.walking(state.play) and super().hears(state, part)

    def propose(
        self, states: Sequence[BanditState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        found: list[TokenTree | None] = [None] * len(views)
        players: dict[int, list[int]] = {}
        for i, s in enumerate(states):
            s.part = self.player.choose(s.play)
            players.setdefault(s.part, []).append(i)
        for p, mine in sorted(players.items()):
            start = perf_counter()
            trees = self.ask(
                p,
                [states[i].parts[p] for i in mine],
                [views[i] for i in mine],
                [budgets[i] for i in mine],
            )
            each = (perf_counter() - start) / len(mine)
            for i, tree in zip(mine, trees, strict=True):
                found[i], s = tree, states[i]
                s.started = start
                self.player.drafted(s.play, views[i], budgets[i], tree, each, len(views))
        return [t for t in found if t is not None]

    def _ask_one(self, part: int, state: Any, view: SeqView, budget: Budget) -> TokenTree:
        (tree,) = self.ask(part, [state], [view], [budget])
        return tree

    def observe(self, states: Sequence[BanditState], feedback: Sequence[Feedback]) -> None:
        self.heard += 1
        super().observe(states, feedback)
        now, alone = perf_counter(), len(states) == 1
        for s, f in zip(states, feedback, strict=True):
            if f.verdict.tokens:
                seconds = now - s.started if s.started else 0.0
                self.player.over(s.play, f, seconds, alone)
            s.started = 0.0  # a step that it slept through says nothing about a part


def repetition(tokens: Sequence[int]) -> int:
    """How much of a prompt repeats itself, in four steps: the share of its pairs of neighbours that
    stood before."""
    last = list(tokens[-1024:])
    pairs = list(pairwise(last))
    share = 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
    return 0 if share < 0.1 else 1 if share < 0.25 else 2 if share < 0.5 else 3
