"""A bandit that need not play to learn: now and then all drafters walk over the same text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, CostModel, Drafter, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.bursts import Burst, Heard, Walk, without_rows
from foretell.drafters.compose import drafts
from foretell.drafters.watch import SLOW, Watch

Ask = Callable[[int, Any, SeqView, Budget], TokenTree]
"""Let one part draft for one sequence: part, its state, view, budget."""

EVERY = 4  # of so many steps one is timed


@dataclass(slots=True)
class Looking:
    """One sequence: what its class knows, the burst it is in, and this step."""

    view: SeqView
    states: list[Any]  # of the parts
    watch: Watch
    part: int = -1
    awake: bool = False  # this part drafted in the step before, too
    steps: int = 0
    modelled: float = 0.0  # seconds that this step should take, if it is timed
    at: int = 0  # committed tokens where it began
    budget: Budget | None = None
    sequences: int = 1
    burst: Burst | None = None
    heard: Heard | None = None  # in the burst, where a part learns from rows


class Looks:
    """rule=watch (`watch.Watch`), by class of request."""

    def __init__(self, parts: Sequence[Drafter], cost: CostModel, ask: Ask) -> None:
        self.parts, self.cost, self.ask = parts, cost, ask
        self.reads = [bool(p.needs.logits or p.needs.taps) for p in parts]
        self.listens = [not getattr(p, "reads_text", False) for p in parts]
        self.known: dict[Hashable, Watch] = {}
        self.drafting: dict[int, float] = {}  # seconds that a part takes to draft

    def begin(self, key: Hashable, view: SeqView, states: list[Any]) -> Looking:
        if key not in self.known:
            most = max(self.known.values(), key=lambda w: w.judged, default=None)
            self.known[key] = most.heir() if most else Watch(len(self.parts))
        return Looking(view, states, self.known[key])

    def choose(self, play: Looking) -> int:
        part = play.watch.leader if play.burst is None else play.burst.player
        play.awake, play.part, play.steps = play.part == part, part, play.steps + 1
        return part

    def drafted(
        self,
        play: Looking,
        view: SeqView,
        budget: Budget,
        tree: TokenTree,
        seconds: float,
        sequences: int,
    ) -> None:
        """Notes what the step should take, and in a burst that the player made it."""
        play.modelled, play.at, play.budget = 0.0, len(view.tokens), budget
        play.sequences = sequences
        if play.awake and play.steps % EVERY == 0:
            play.modelled = seconds + self._forward(play, tree)
        if play.burst is None and play.watch.due():
            play.burst = play.watch.begin(play.part, play.at)
            play.heard = Heard() if any(self.reads) else None
        burst = play.burst
        if burst is not None and burst.open:
            burst.steps += 1
            self._step(play, play.part, tree, seconds)

    def walking(self, play: Looking) -> bool:
        """Whether parts are told of the text when they come to it, and not before."""
        return play.burst is not None

    def over(self, play: Looking, f: Feedback, seconds: float, alone: bool) -> None:
        play.watch.earned(seconds)
        if play.modelled and alone and seconds:
            play.watch.took(play.part, play.modelled, seconds)
        burst = play.burst
        if burst is None:
            return
        if not seconds:  # the player slept: what came has not been seen
            play.burst = play.heard = None
            return
        start = perf_counter()
        if play.heard is not None:
            play.heard.hear(f, play.at)
        burst.read(play.view.tokens)
        for part, walk in enumerate(burst.walks):
            self._walk(play, burst, part, walk)
        if burst.over:
            play.watch.saw(burst)
            play.burst = play.heard = None
        play.watch.looked(perf_counter() - start)

    def end(self, play: Looking) -> None:
        burst = play.burst
        if burst is not None and len(play.view.tokens) > burst.start:
            burst.stop(play.view.tokens)
            if burst.over:
                play.watch.saw(burst)
        play.burst = play.heard = None

    def _walk(self, play: Looking, burst: Burst, part: int, walk: Walk) -> None:
        """Steps of a part over the text that has come."""
        text, plays = play.view.tokens, part == burst.player
        while walk.at < burst.reach(text):
            if walk.tree is None:
                if plays:
                    return
                assert play.budget is not None
                seen = replace(play.view, tokens=text[: walk.at], cached=walk.at - 1)
                start = perf_counter()
                tree = self.ask(part, play.states[part], seen, play.budget)
                self._step(play, part, tree, perf_counter() - start)
            at, tree = walk.at, walk.tree
            verdict = walk.read(text)
            if verdict is None or tree is None:
                return
            if not plays and self.listens[part]:
                told: Feedback | None = without_rows(tree, verdict)
                if self.reads[part] and play.heard is not None:
                    told = play.heard.feedback(at, tree, verdict)
                if told is not None:
                    self.parts[part].observe([play.states[part]], [told])

    def _step(self, play: Looking, part: int, tree: TokenTree, seconds: float) -> None:
        assert play.burst is not None
        walk = play.burst.walks[part]
        known = self.drafting.get(part)
        if known is None:
            known = self.drafting[part] = seconds
        elif walk.at > play.burst.start:  # at first it catches up with the text
            known = self.drafting[part] = known + SLOW * (min(seconds, 3 * known) - known)
        walk.step(tree, known + self._forward(play, tree))

    def _forward(self, play: Looking, tree: TokenTree) -> float:
        rows, n = play.sequences * (1 + drafts(tree)), play.sequences
        return self.cost.seconds(rows, n * play.view.cached, n)
