"""A race between settings: all run the same prompts, and losers leave as soon as they are known.

Speed-ups are paired by prompt: what counts is log(seconds a token of plain decoding / seconds a
token of the setting) on the same prompt in the same round, so a hard prompt or a noisy minute hits
both. A setting leaves when even an optimistic reading of its results lies below a pessimistic
reading of the leader's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

ROUNDS = 2  # before anybody leaves for good
Z = 1.64  # one-sided 95 %
SPREAD = 0.10  # spread of log ratios assumed beside the measured one, worth two observations


@dataclass(slots=True)
class Run:
    """One prompt decoded by one setting."""

    seconds: float  # decoding, prefill left out
    tokens: int  # decoded in that time
    ids: list[int]  # the whole output
    acceptance_length: float = 1.0

    @property
    def pace(self) -> float:
        """Seconds a token."""
        return self.seconds / max(1, self.tokens)


@dataclass(slots=True)
class Entrant:
    """A setting in the race and what it has shown."""

    name: str
    gains: list[float] = field(default_factory=list)  # log speed-up over plain decoding, by prompt
    lengths: list[float] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    out: str = ""  # why it left; empty = still in

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gains) if self.gains else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean; a prior keeps two equal observations from looking certain."""
        n = len(self.gains)
        spread = statistics.pvariance(self.gains) * n if n > 1 else 0.0
        return math.sqrt((spread + 2 * SPREAD**2) / (n + 2) / max(1, n))

    @property
    def low(self) -> float:
        return self.mean - Z * self.error

    @property
    def high(self) -> float:
        return self.mean + Z * self.error

    def to_json(self) -> dict[str, Any]:
        return {
            "setting": self.name,
            "speedup": round(math.exp(self.mean), 4),
            "speedup_low": round(math.exp(self.low), 4),
            "speedup_high": round(math.exp(self.high), 4),
            "tokens_per_s": round(1 / statistics.median(self.paces), 2) if self.paces else None,
            "acceptance_length": round(statistics.fmean(self.lengths), 3) if self.lengths else None,
            "prompts": len(self.gains),
            "rejected": self.out or None,
        }


@dataclass(slots=True)
class Race:
    """Run `settings` against `plain` until one is left, prompts run out, or `stop()` says so.

    run(setting, prompt) decodes one prompt with one setting. An entrant whose tokens differ from
    plain decoding's although it must not leaves at once.
    """

    run: Callable[[str, Any], Run]
    plain: str
    settings: Sequence[str]
    exact: bool = True  # whether the tokens must be those of plain decoding
    stop: Callable[[], bool] = lambda: False
    progress: Callable[[str], None] = lambda text: None
    entrants: list[Entrant] = field(init=False)
    base: Entrant = field(init=False)

    def __post_init__(self) -> None:
        self.entrants = [Entrant(s) for s in self.settings if s != self.plain]
        self.base = Entrant(self.plain)

    def go(self, prompts: Sequence[Any]) -> Entrant:
        """The winner: the entrant with the highest mean speed-up, or plain decoding when none of
        them is surely faster."""
        for number, prompt in enumerate(prompts):
            if self.stop() or (number >= ROUNDS and len(self.alive) < 2 and self._clear()):
                break
            self._round(number, prompt)
        best = self.leader
        if best is None or best.low <= 0:
            return self.base
        return best

    @property
    def alive(self) -> list[Entrant]:
        return [e for e in self.entrants if not e.out]

    @property
    def leader(self) -> Entrant | None:
        return max(self.alive, key=lambda e: e.mean, default=None)

    def _clear(self) -> bool:
        """Whether it is known if the leader beats plain decoding."""
        best = self.leader
        return best is None or best.low > 0 or best.high < 0

    def _round(self, number: int, prompt: Any) -> None:
        reference = self.run(self.plain, prompt)
        self._note(self.base, reference, reference)
        order = self.alive
        shift = number % max(1, len(order))  # nobody is always the one after the cold start
        for entrant in [*order[shift:], *order[:shift]]:
            if self.stop() and number >= 1:
                return
            self.progress(f"prompt {number + 1}: {entrant.name} ({len(order)} in the race)")
            result = self.run(entrant.name, prompt)
            self._note(entrant, result, reference)
            if self.exact and result.ids != reference.ids:
                entrant.out = "its output differs from plain decoding's (near-ties: foretell check)"
        if number + 1 >= ROUNDS:
            self._drop()

    def _note(self, entrant: Entrant, result: Run, reference: Run) -> None:
        entrant.gains.append(math.log(reference.pace / result.pace))
        entrant.paces.append(result.pace)
        entrant.lengths.append(result.acceptance_length)

    def _drop(self) -> None:
        best = self.leader
        if best is None:
            return
        bar, name = max((best.low, best.name), (0.0, self.plain))
        for e in self.alive:
            if e is not best and e.high < bar:
                e.out = (
                    f"x{math.exp(e.mean):.2f} after {len(e.gains)} prompts, at most "
                    f"x{math.exp(e.high):.2f}; {name} reaches at least x{math.exp(bar):.2f}"
                )
