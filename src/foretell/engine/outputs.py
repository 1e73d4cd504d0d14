"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foretell.engine.metrics import Stats
from foretell.engine.sequence import TopLogprobs


@dataclass(slots=True)
class SampleOutput:
    """One of the n continuations of a prompt."""

    text: str
    token_ids: list[int]  # the token that ended it included
    finish_reason: str  # "stop" or "length"
    seed: int
    drafted: list[bool]  # per token: drafted and accepted, or the target's own
    stats: Stats
    logprobs: list[TopLogprobs] | None  # raw, per token


@dataclass(slots=True)
class RequestOutput:
    """A prompt's continuations, and how they were decoded."""

    prompt_ids: list[int]
    samples: list[SampleOutput]
    prompt_logprobs: list[TopLogprobs | None] | None
    promise: str
    drafter: str
    verifier: str

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.samples[0].finish_reason

    @property
    def stats(self) -> Stats:
        return self.samples[0].stats

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints; with n > 1 the others are under "samples"."""
        objects = [self._sample(s) for s in self.samples]
        result = objects[0]
        if len(objects) > 1:
            result = {**objects[0], "samples": objects}
        if self.prompt_logprobs is not None:
            result["prompt_logprobs"] = [_top(t) if t else None for t in self.prompt_logprobs]
        return result

    def _sample(self, s: SampleOutput) -> dict[str, Any]:
        result: dict[str, Any] = {
            "text": s.text,
            "token_ids": s.token_ids,
            "finish_reason": s.finish_reason,
            "promise": self.promise,
            "seed": s.seed,
            "usage": {
                "prompt_tokens": len(self.prompt_ids),
                "completion_tokens": len(s.token_ids),
            },
            "timing": s.stats.timing(),
            "speculation": s.stats.speculation(self.drafter, self.verifier),
        }
        if s.logprobs is not None:
            result["logprobs"] = [_top(t) for t in s.logprobs]
        return result


def _top(entry: TopLogprobs) -> dict[str, Any]:
    return {"logprob": round(entry[0], 6), "top": [[i, round(v, 6)] for i, v in entry[1]]}
