"""Sampling parameters of a request. No torch here: the command line imports it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from foretell.core.errors import InputError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to turn logits into tokens and when to stop. The defaults decode greedily.

    Order of the processors, the same for plain decoding and for every node of a tree: repetition,
    presence and frequency penalties, logit_bias, allowed_token_ids, bad_words, min_tokens,
    constraint, temperature, top_k, top_p, min_p, typical_p.

    Raises InputError, naming the parameter, when a value makes no sense.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False  # keep the stop string in the text
    ignore_eos: bool = False
    seed: int | None = None  # None = a fresh one, reported with the output
    n: int = 1
    logprobs: int | None = None  # top n of the raw distribution at each emitted token
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.bad_words, str):
            object.__setattr__(self, "bad_words", (self.bad_words,))

        def need(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise InputError(f"{name}={getattr(self, name)!r} makes no sense: {rule}.")

        def finite(name: str) -> bool:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return number and math.isfinite(value)

        def whole(name: str) -> bool:
            value = getattr(self, name)
            return isinstance(value, int) and not isinstance(value, bool)

        need("max_tokens", whole("max_tokens") and self.max_tokens >= 1, "it is at least 1")
        need("min_tokens", whole("min_tokens") and self.min_tokens >= 0, "it is at least 0")
        need(
            "min_tokens",
            self.min_tokens <= self.max_tokens,
            f"it cannot exceed max_tokens={self.max_tokens}",
        )
        ok = finite("temperature") and self.temperature >= 0
        need("temperature", ok, "it is 0 (greedy) or a positive number")
        need("top_k", whole("top_k") and self.top_k >= 0, "it is 0 (off) or a positive integer")
        need("top_p", finite("top_p") and 0 < self.top_p <= 1, "it lies in (0, 1]")
        need("min_p", finite("min_p") and 0 <= self.min_p <= 1, "it lies in [0, 1]")
        need("typical_p", finite("typical_p") and 0 < self.typical_p <= 1, "it lies in (0, 1]")
        ok = finite("repetition_penalty") and self.repetition_penalty > 0
        need("repetition_penalty", ok, "it is a positive number (1 = off)")
        for name in ("presence_penalty", "frequency_penalty"):
            need(name, finite(name), "it is a finite number (0 = off)")
        need("n", whole("n") and self.n >= 1, "it is at least 1")
        ok = self.seed is None or (whole("seed") and self.seed >= 0)
        need("seed", ok, "it is a non-negative integer")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or (whole(name) and 0 <= value <= 100)
            need(name, ok, "it lies in 0..100")
        need("stop", all(isinstance(s, str) and s for s in self.stop), "stop strings are not empty")
        need("bad_words", all(isinstance(s, str) and s for s in self.bad_words), "no empty words")
        ok = all(math.isfinite(v) or v == -math.inf for v in self.logit_bias.values())
        need("logit_bias", ok, "its values are finite, or -inf to forbid a token")
        ok = self.allowed_token_ids is None or len(self.allowed_token_ids) > 0
        need("allowed_token_ids", ok, "it names at least one token")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


PROMISES = ("exact", "lossless", "lossy")  # strongest first; `protocols.Promise` has their meaning


@dataclass(frozen=True, slots=True)
class Speculation:
    """What one request wants of speculation. It never changes what plain decoding would say.

    drafter: a name that the engine offers, "off", or None for its default; max_draft: most drafted
    tokens a step (of a tree: nodes), 0 = off, None = as the engine decides; promise: the weakest
    that is accepted, None = whatever the engine is set to. Raises InputError.
    """

    drafter: str | None = None
    max_draft: int | None = None
    promise: str | None = None

    def __post_init__(self) -> None:
        most, whole = self.max_draft, isinstance(self.max_draft, int)
        if most is not None and (isinstance(most, bool) or not whole or most < 0):
            raise InputError(f"max_draft={most!r} makes no sense: it is 0 (off) or more tokens.")
        if self.promise is not None and self.promise not in PROMISES:
            raise InputError(
                f"promise={self.promise!r} is not a promise: choose {', '.join(PROMISES[:-1])} "
                f"or {PROMISES[-1]}."
            )
        if self.drafter is not None and not isinstance(self.drafter, str):
            raise InputError(f"drafter={self.drafter!r} is not a name: name a drafter, or 'off'.")

    @property
    def off(self) -> bool:
        """Whether nothing at all may be drafted."""
        return self.drafter == "off" or self.max_draft == 0

    @property
    def limit(self) -> int:
        """Most drafted tokens of a step."""
        if self.drafter == "off":
            return 0
        return 1 << 30 if self.max_draft is None else self.max_draft


NO_WISH = Speculation()
