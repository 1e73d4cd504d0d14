"""One request: a prompt and the sequences of its n samples."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from foretell.core.params import NO_WISH, SamplingParams, Speculation
from foretell.core.protocols import Promise
from foretell.engine.outputs import RequestOutput, SampleOutput
from foretell.engine.sequence import Sequence, TokenEvent


@dataclass(slots=True)
class Request:
    """A prompt, what is wanted of it, and its samples."""

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    promise: Promise  # what its output will promise
    drafter: str  # the name of who drafts for it
    control: Speculation = NO_WISH
    sequences: list[Sequence] = field(default_factory=list)
    inbox: deque[TokenEvent] = field(default_factory=deque)

    def speculation(self, sample: int = 0) -> dict[str, Any]:
        """What speculation did for a sample, so far; "why_off" says why nothing was drafted."""
        seq = self.sequences[sample]
        result = seq.stats.speculation(self.drafter, seq.verifier.name)
        return {**result, "promise": str(self.promise), "why_off": seq.stats.why_off}

    def output(self) -> RequestOutput:
        """All samples, as far as they have come."""
        first = self.sequences[0]
        return RequestOutput(
            prompt_ids=self.prompt,
            samples=[
                SampleOutput(
                    text=s.finish.text,
                    token_ids=s.output,
                    finish_reason=s.finish.reason or "length",
                    seed=s.view.rng.seed,
                    drafted=s.drafted,
                    stats=s.stats,
                    logprobs=s.logprobs if self.params.logprobs is not None else None,
                )
                for s in self.sequences
            ],
            prompt_logprobs=first.prompt_logprobs or None,
            promise=str(self.promise),
            drafter=self.drafter,
            verifier=first.verifier.name,
        )
