"""What a sequence cost and what speculation brought it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Stats:
    """Counters of one sequence. A step that only prefills is not counted in `steps`."""

    steps: int = 0  # target forwards that emitted tokens
    emitted: int = 0
    drafted: int = 0
    per_position: list[int] = field(default_factory=list)  # accepted at draft position 1, 2, ...
    histogram: list[int] = field(default_factory=list)  # steps that accepted 0, 1, 2, ... tokens
    reused: int = 0  # prompt rows taken from another sequence's cache
    preempted: int = 0
    start: float = 0.0  # seconds, monotonic: first scheduled
    first: float = 0.0  # first token out
    end: float = 0.0

    def add(self, drafted: int, emitted: int) -> None:
        """One decoding step. The last emitted token counts as the bonus token, so that
        ``emitted == steps + accepted`` also where a stop cut an accepted path."""
        self.steps += 1
        self.emitted += emitted
        self.drafted += drafted
        accepted = emitted - 1
        _grow(self.per_position, accepted)
        for i in range(accepted):
            self.per_position[i] += 1
        _grow(self.histogram, accepted + 1)
        self.histogram[accepted] += 1

    @property
    def accepted(self) -> int:
        return self.emitted - self.steps

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per target step, bonus token included; 1.0 for plain decoding."""
        return self.emitted / self.steps if self.steps else 0.0

    @property
    def prefill_s(self) -> float:
        return self.first - self.start

    @property
    def decode_s(self) -> float:
        return self.end - self.first

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: the tokens after the first step's, over the time after it."""
        first_step = self.first_step
        later = self.emitted - first_step
        return later / self.decode_s if later > 0 and self.decode_s > 0 else 0.0

    first_step: int = 0  # tokens the first step emitted

    def timing(self) -> dict[str, float]:
        return {
            "prefill_s": round(self.prefill_s, 6),
            "decode_s": round(self.decode_s, 6),
            "tokens_per_s": round(self.tokens_per_s, 3),
        }

    def speculation(self, drafter: str, verifier: str) -> dict[str, Any]:
        return {
            "drafter": drafter,
            "verifier": verifier,
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_length": round(self.acceptance_length, 4),
            "accepted_per_position": list(self.per_position),
        }


def _grow(values: list[int], size: int) -> None:
    values.extend([0] * (size - len(values)))
