"""Two decodings of one prompt: where they part, and whether rounding explains it.

Plain and speculative decoding compute the same numbers in batches of different shapes, and on most
backends that changes the last bits of the logits. Where the two best tokens are that close, either
may win: a *near-tie*. Anything else is a violation. What follows a difference is not compared: the
two texts then differ legitimately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

SAFETY = 4.0  # a near-tie is at most this many times the measured noise
ROUNDING = 2.0**-22  # float32 noise of a logit, relative to the largest: never assume less


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token at which two decodings of a prompt differ."""

    prompt: int
    position: int  # index in the output
    plain: int | None  # token ids; None = this side had ended
    speculative: int | None
    best: tuple[int, int]  # the reference's top-1 and top-2 at that place
    margin: float  # score of top-1 minus that of top-2
    tolerance: float
    near_tie: bool

    def sentence(self, name: Callable[[int], str] = str) -> str:
        """name(id): how to print a token."""
        said = ["the end" if t is None else name(t) for t in (self.plain, self.speculative)]
        verdict = "a near-tie" if self.near_tie else "NOT explained by rounding"
        return (
            f"prompt {self.prompt + 1}, token {self.position}: plain says {said[0]}, speculative "
            f"{said[1]}; the reference prefers {name(self.best[0])} to {name(self.best[1])} by "
            f"{self.margin:.3g} (tolerance {self.tolerance:.3g}): {verdict}"
        )


@dataclass(slots=True)
class Comparison:
    """Plain against speculative decoding over many prompts."""

    compared: int = 0
    identical: int = 0
    tokens: int = 0  # compared tokens, up to the first difference
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def near_ties(self) -> int:
        return sum(d.near_tie for d in self.divergences)

    @property
    def violations(self) -> int:
        return len(self.divergences) - self.near_ties

    def add(self, divergence: Divergence | None, tokens: int) -> None:
        self.compared += 1
        self.tokens += tokens
        if divergence is None:
            self.identical += 1
        else:
            self.divergences.append(divergence)

    def to_json(self) -> dict[str, Any]:
        return {
            "compared": self.compared,
            "identical": self.identical,
            "near_ties": self.near_ties,
            "violations": self.violations,
            "tokens": self.tokens,
            "divergences": [
                {
                    "prompt": d.prompt,
                    "position": d.position,
                    "plain": d.plain,
                    "speculative": d.speculative,
                    "best": list(d.best),
                    "margin": d.margin,
                    "tolerance": d.tolerance,
                    "near_tie": d.near_tie,
                }
                for d in self.divergences
            ],
        }


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two id lists differ (one may end there); None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def tolerance_of(noise: float, logits: Tensor) -> float:
    """How close two scores must be to count as tied. noise: the largest difference seen between
    the logits of forwards of different shapes over one prefix."""
    finite = logits[logits.isfinite()]
    scale = float(finite.abs().max()) if len(finite) else 0.0
    return max(SAFETY * noise, ROUNDING * scale)


def explain(
    prompt: int,
    position: int,
    plain: int | None,
    speculative: int | None,
    scores: Tensor,
    tolerance: float,
) -> Divergence:
    """Judge one difference. scores [V]: what decoding maximises at that place - the logits, or for
    replay ``log p - log E`` (see `race_scores`)."""
    values, ids = scores.topk(2)
    margin = float(values[0] - values[1])
    # One side having ended is never rounding: both had said the same tokens.
    sides = (plain, speculative)
    tied = [t is not None and float(values[0] - scores[t]) <= tolerance for t in sides]
    best = (int(ids[0]), int(ids[1]))
    return Divergence(
        prompt, position, plain, speculative, best, margin, tolerance, near_tie=all(tied)
    )


def race_scores(probs: Tensor, noise: Tensor) -> Tensor:
    """[V] ``log p - log E``: replay emits the argmax of ``p / E``."""
    return probs.log() - noise.log()
