"""What a sequence cost and what speculation brought it; and the same of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

WHY_OFF: Mapping[str, str] = MappingProxyType(
    {
        "asked": "the request asked for no drafts",
        "policy": "the policy expects no gain at this load",
        "rows": "the cache has no free rows for drafts",
        "end": "too little was left to say",
        "nothing": "the drafter found nothing to draft",
        "none": "no drafter is set",
    }
)
LONGEST = 64  # longer drafts are counted with those of this length


@dataclass(slots=True)
class Stats:
    """Counters of one sequence. A step that only prefills is not counted in `steps`."""

    steps: int = 0  # target forwards that emitted tokens
    emitted: int = 0
    drafts: int = 0  # of those, steps with a draft
    drafted: int = 0
    per_position: list[int] = field(default_factory=list)  # accepted at draft position 1, 2, ...
    histogram: list[int] = field(default_factory=list)  # steps that accepted 0, 1, 2, ... tokens
    reused: int = 0  # prompt rows taken from another sequence's cache
    preempted: int = 0
    off: dict[str, int] = field(default_factory=dict)  # steps without a draft, by key of WHY_OFF
    start: float = 0.0  # seconds, monotonic: first scheduled
    first: float = 0.0  # first token out
    end: float = 0.0

    def add(self, drafted: int, emitted: int) -> None:
        """One decoding step. The last emitted token counts as the bonus token, so that
        ``emitted == steps + accepted`` also where a stop cut an accepted path."""
        self.steps += 1
        self.emitted += emitted
        self.drafts += drafted > 0
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

    @property
    def why_off(self) -> str | None:
        """Why nothing was drafted, in words; None where something was, or no step was made."""
        if self.drafts or not self.off:
            return None
        return WHY_OFF[max(self.off, key=lambda key: self.off[key])]

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
            "drafts": self.drafts,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_length": round(self.acceptance_length, 4),
            "accepted_per_position": list(self.per_position),
        }


@dataclass(slots=True)
class Totals:
    """Counters of an engine since it was made. One thread writes; others may read."""

    steps: int = 0
    draft_s: float = 0.0
    target_s: float = 0.0
    verify_s: float = 0.0
    prompt: int = 0  # ids of prompts that were begun
    generated: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    per_position: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [0] * (LONGEST + 1))
    """Decisions of the policy, sequence by sequence and step by step, by draft length."""
    off: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHY_OFF, 0))

    def decided(self, stats: Stats, length: int, why: str | None) -> None:
        """A step of one sequence may draft `length` levels; why: a key of WHY_OFF if it may not,
        or did not."""
        self.lengths[min(length, LONGEST)] += 1
        if why is not None:
            self.off[why] += 1
            stats.off[why] = stats.off.get(why, 0) + 1

    def emitted(self, drafted: int, tokens: int) -> None:
        """One sequence's part of a step."""
        self.generated += tokens
        if drafted:
            self.drafts += 1
            self.drafted += drafted
            accepted = tokens - 1
            self.accepted += accepted
            _grow(self.per_position, accepted)
            for i in range(accepted):
                self.per_position[i] += 1


def _grow(values: list[int], size: int) -> None:
    values.extend([0] * (size - len(values)))
