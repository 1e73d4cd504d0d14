"""One sequence on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from foretell.control.finish import Finish
from foretell.control.processors import Processors
from foretell.core.params import SamplingParams
from foretell.core.protocols import Constraint, KVCache, SeqView, Verifier
from foretell.engine.metrics import Stats

TopLogprobs = tuple[float, list[tuple[int, float]]]  # of the token itself, of the n most likely


@dataclass(slots=True)
class TokenEvent:
    """One emitted token, whatever the size of the step it came from."""

    request: int
    sample: int  # 0 .. n-1
    index: int  # position in the output
    token: int
    text: str  # what became readable with it; "" while a character or a stop string is open
    drafted: bool  # a draft that the target agreed with, or the target's own
    logprob: TopLogprobs | None = None
    finish_reason: str | None = None  # set on the last event: "stop" or "length"
    output: Any = None  # on the last event of a stream: the RequestOutput


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and output ids, cache, and the per-sequence state of every part.

    ``tokens`` are all committed ids; the cache holds rows for ``tokens[:cache.n]``; the rest is
    *pending*, at least one id when ready to decode.
    """

    request: int
    sample: int
    params: SamplingParams
    view: SeqView
    finish: Finish
    processors: Processors
    verifier: Verifier
    constraint: Constraint | None = None
    cache: KVCache | None = None  # None while waiting or preempted
    draft: Any = None  # the drafter's state; exists while the cache does
    stats: Stats = field(default_factory=Stats)
    drafted: list[bool] = field(default_factory=list)  # per output token
    logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TopLogprobs | None] = field(default_factory=list)
    open: bool = False  # the prompt still grows: it is read, all but its last id, never decoded
    order: int = 0  # the scheduler's: when it was admitted
    leaders: list[tuple[Sequence, int]] = field(default_factory=list)
    """The scheduler's: older sequences that begin alike, and how many ids they share."""

    @property
    def tokens(self) -> list[int]:
        return self.view.tokens

    @property
    def rows(self) -> int:
        """Cache rows held."""
        return self.cache.n if self.cache is not None else 0

    @property
    def pending(self) -> int:
        """Ids whose rows are missing."""
        return len(self.tokens) - self.rows

    @property
    def most_rows(self) -> int:
        """Rows it can come to hold, drafts not counted."""
        return self.view.prompt_len + self.finish.room

    @property
    def output(self) -> list[int]:
        return self.tokens[self.view.prompt_len :]

    @property
    def said(self) -> int:
        """Tokens of the output."""
        return len(self.view.tokens) - self.view.prompt_len
