"""Superposed decoding: several suggestions for the price of one. Lossy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.core.protocols import Promise, TargetModel
from foretell.core.rows import topk_rows

CHUNK = 512  # prompt rows of one forward


@dataclass(frozen=True, slots=True)
class Draft:
    """A suggestion under way."""

    tokens: tuple[int, ...]
    logprob: float  # sum of what its tokens had in the shared distributions


@dataclass(slots=True)
class Suggestion:
    text: str
    token_ids: list[int]
    logprob: float
    finish_reason: str  # "stop" or "length"


@dataclass(slots=True)
class Suggestions:
    """What a prompt may go on with, the most probable first."""

    prompt_ids: list[int]
    suggestions: list[Suggestion]
    forwards: int  # of one row each, after the prompt
    promise: str = str(Promise.LOSSY)

    def to_json(self) -> dict[str, Any]:
        return {
            "suggestions": [
                {
                    "text": s.text,
                    "token_ids": s.token_ids,
                    "logprob": round(s.logprob, 6),
                    "finish_reason": s.finish_reason,
                }
                for s in self.suggestions
            ],
            "promise": self.promise,
            "usage": {
                "prompt_tokens": len(self.prompt_ids),
                "completion_tokens": sum(len(s.token_ids) for s in self.suggestions),
                "forwards": self.forwards,
            },
        }


def weights(drafts: Sequence[Draft]) -> dict[int, float]:
    """Last token -> its share in the superposition: the softmax of the drafts' log-probabilities,
    summed over drafts that end alike."""
    best = max(d.logprob for d in drafts)
    each = np.exp([d.logprob - best for d in drafts])
    shares: dict[int, float] = {}
    for draft, w in zip(drafts, each / each.sum(), strict=True):
        shares[draft.tokens[-1]] = shares.get(draft.tokens[-1], 0.0) + float(w)
    return shares


def extended(drafts: Sequence[Draft], logits: Tensor, k: int) -> list[Draft]:
    """The best k of all drafts by one of the k most probable tokens; logits [V] that all share.
    Distinct drafts stay distinct. Ties go to the earlier draft, then to the lower id."""
    values, ids = topk_rows(logits[None], min(k, len(logits)))
    values = values - float(logits.logsumexp(-1))
    longer = [
        Draft((*d.tokens, int(t)), d.logprob + float(v))
        for d in drafts
        for t, v in zip(ids[0], values[0], strict=True)
    ]
    return sorted(longer, key=lambda d: -d.logprob)[:k]


@torch.inference_mode()
def superposed(
    model: TargetModel, prompt: Sequence[int], k: int, max_tokens: int, ends: Collection[int] = ()
) -> tuple[list[Draft], int]:
    """The k best drafts (those that reached one of `ends` among them) and how many forwards they
    took after the prompt's: one of one row for each further token, whatever k is.

    Each forward reads one superposed row, the mean of the embeddings of the drafts' last tokens by
    `weights`, and its one distribution extends every draft. k = 1 is greedy decoding.

    Paper: Shen et al., "Superposed Decoding: Multiple Generations from a Single Autoregressive
    Inference Pass" (2024), without its interpolation with n-grams. Promise: lossy.
    """
    cache = model.new_cache(len(prompt) + max_tokens)
    logits = torch.empty(0)
    for at in range(0, len(prompt), CHUNK):
        part = np.asarray(prompt[at : at + CHUNK], np.int64)
        logits = _forward(model, cache, Segment(part, np.arange(at, at + len(part))))
    drafts, done, forwards = [Draft((), 0.0)], [], 0
    while True:
        drafts = extended(drafts, logits, k - len(done))
        done += [d for d in drafts if d.tokens[-1] in ends]
        drafts = [d for d in drafts if d.tokens[-1] not in ends]
        if not drafts or len(drafts[0].tokens) >= max_tokens:
            break
        shares = weights(drafts)
        token, n = np.asarray([next(iter(shares))], np.int64), cache.n
        mixed = None
        if len(shares) > 1:
            vectors = model.embed(torch.tensor(list(shares)))
            share = torch.tensor(list(shares.values()), dtype=torch.float32, device=vectors.device)
            mixed = {0: (share @ vectors.float()).to(vectors.dtype)}
        logits = _forward(model, cache, Segment(token, np.arange(n, n + 1), embeds=mixed))
        forwards += 1
    return sorted([*done, *drafts], key=lambda d: -d.logprob), forwards


def _forward(model: TargetModel, cache: Any, segment: Segment) -> Tensor:
    """Run and keep the rows; logits [V] after the last."""
    segment.logits = np.array([len(segment) - 1])
    with model.open([cache]) as txn:
        logits = model.forward(PackedBatch([segment]), txn).logits[0]
        txn.commit([range(len(segment))])
    return logits


class Superposed:
    """The mode: up to `max_tokens` tokens of `k` suggestions (see `superposed`)."""

    name = "superposed"
    promise = Promise.LOSSY
    paper = "Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass"
    summary = "k suggestions from one forward a token: generate --suggestions K (lossy)"

    def __init__(self, k: int = 3, max_tokens: int = 16) -> None:
        if k < 1:
            raise InputError(f"{k} suggestions make no sense: ask for at least 1.")
        if max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens} makes no sense: it is at least 1.")
        self.k, self.max_tokens = k, max_tokens

    def __call__(
        self,
        model: TargetModel,
        prompt: Sequence[int],
        ends: Collection[int],
        text: Callable[[list[int]], str],
    ) -> Suggestions:
        return suggest(model, prompt, self.k, self.max_tokens, ends, text)


def suggest(
    model: TargetModel,
    prompt: Sequence[int],
    k: int,
    max_tokens: int,
    ends: Collection[int],
    text: Callable[[list[int]], str],
) -> Suggestions:
    """`superposed`, checked against the model and told as text."""
    if k > model.spec.vocab:
        raise InputError(f"{k} suggestions make no sense: ask for 1 to {model.spec.vocab}.")
    room = model.spec.max_positions - len(prompt)
    if room < 1:
        raise InputError(
            f"The prompt has {len(prompt)} tokens and the model's context is "
            f"{model.spec.max_positions}: shorten it."
        )
    drafts, forwards = superposed(model, prompt, k, min(max_tokens, room), ends)
    found = []
    for d in drafts:
        stopped = d.tokens[-1] in ends
        shown = list(d.tokens[:-1] if stopped else d.tokens)
        reason = "stop" if stopped else "length"
        found.append(Suggestion(text(shown), list(d.tokens), d.logprob, reason))
    return Suggestions(list(prompt), found, forwards)
