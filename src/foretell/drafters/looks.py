"""A bandit that need not play to learn: now and then all drafters walk over the same text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Set
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from foretell.core.protocols import Budget, CostModel, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.bursts import Burst
from foretell.drafters.compose import drafts
from foretell.drafters.watch import SLOW, Watch

Ask = Callable[[int, Any, SeqView, Budget], TokenTree]
"""Let one part draft for one sequence: part, its state, view, budget."""

EVERY = 4  # of so many steps one is timed


@dataclass(slots=True)
class Looking:
    """One sequence: what its class knows, the burst it is in, and this step."""

    view: SeqView
    parts: list[Any]
    watch: Watch
    part: int = -1
    awake: bool = False  # this part drafted in the step before, too
    steps: int = 0
    modelled: float = 0.0  # seconds that this step should take, if it is timed
    aside: float = 0.0  # seconds of it that went into looking
    burst: Burst | None = None


class Looks:
    """rule=watch (`watch.Watch`), by class of request."""

    def __init__(self, count: int, cost: CostModel, ask: Ask) -> None:
        self.count, self.cost, self.ask = count, cost, ask
        self.known: dict[Hashable, Watch] = {}
        self.drafting: dict[int, float] = {}  # seconds that a part takes to draft

    def begin(self, key: Hashable, view: SeqView, parts: list[Any]) -> Looking:
        if key not in self.known:
            most = max(self.known.values(), key=lambda w: w.judged, default=None)
            self.known[key] = most.heir() if most else Watch(self.count)
        return Looking(view, parts, self.known[key])

    def choose(self, play: Looking) -> int:
        leader = play.watch.leader
        play.awake, play.part, play.steps = play.part == leader, leader, play.steps + 1
        return play.part

    def drafted(
        self,
        play: Looking,
        view: SeqView,
        budget: Budget,
        tree: TokenTree,
        seconds: float,
        sequences: int,
    ) -> Set[int]:
        """Notes what the step should take; in a burst, lets those others draft whose walk has come
        here."""
        play.modelled = play.aside = 0.0
        if play.awake and play.steps % EVERY == 0:
            play.modelled = seconds + self._forward(tree, view, sequences)
        if play.burst is None and play.watch.due(play.steps):
            play.burst = play.watch.begin(len(view.tokens))
        burst = play.burst
        if burst is None or not burst.open:
            return frozenset()
        start, asked = perf_counter(), set[int]()
        for p, walk in enumerate(burst.walks):
            if not walk.free(len(view.tokens)):
                continue
            begin, own, spent = perf_counter(), tree, seconds
            if p != play.part:
                own = self.ask(p, play.parts[p], view, budget)
                spent = perf_counter() - begin
                asked.add(p)
            if burst.steps or p not in self.drafting:  # at first it catches up with the text
                old = self.drafting.get(p, spent)
                self.drafting[p] = old + SLOW * (min(spent, 3 * old) - old)
            modelled = self.drafting[p] + self._forward(own, view, sequences)
            walk.step(len(view.tokens), own, modelled)
        burst.steps += 1
        play.aside = perf_counter() - start
        play.watch.looked(play.aside)
        return asked

    def _forward(self, tree: TokenTree, view: SeqView, sequences: int) -> float:
        rows = sequences * (1 + drafts(tree))
        return self.cost.seconds(rows, sequences * view.cached, sequences)

    def over(self, play: Looking, tokens: int, seconds: float, telling: float, alone: bool) -> None:
        watch, burst = play.watch, play.burst
        watch.earned(seconds)
        if play.modelled and alone:
            watch.took(play.part, play.modelled, seconds - play.aside)
        if play.aside and alone:  # who was asked is told, and learns
            watch.looked(telling)
        if burst is not None:
            start = perf_counter()
            if burst.read(play.view.tokens):
                watch.saw(burst)
                play.burst = None
            watch.looked(perf_counter() - start)
