"""The parts of an answer that are tables: log-probabilities and what speculation did."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from foretell.engine.sequence import TopLogprobs
from foretell.models.text.stream import StreamDecoder
from foretell.models.text.tokenizer import Tokenizer
from foretell.serve.job import Job

LEAST = -9999.0  # a forbidden token; JSON has no infinity


@dataclass(frozen=True, slots=True)
class Level:
    """How much an answer tells about speculation. told: the `speculation` block; detailed: one for
    every choice, with its histogram; vllm: also `metrics.speculative_decoding`, under the names of
    vLLM's --per-request-spec-decode-metrics."""

    told: bool = True
    detailed: bool = False
    vllm: bool = False

    @classmethod
    def of(cls, flag: str | None) -> Level:
        """flag: none, summary, detailed, or None where nobody asked: our block alone."""
        return cls(flag != "none", flag == "detailed", flag in ("summary", "detailed"))


BLOCK = Level()

# Log-probabilities


def spelt(tokenizer: Tokenizer, token: int, as_id: bool = False) -> str:
    """A token as text; one that is only a part of a character as "bytes:\\xe2\\x80"."""
    if as_id:
        return f"token_id:{token}"
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


class Ruler:
    """Counts characters: where each token begins in a text."""

    __slots__ = ("at", "decoder")

    def __init__(self, decoder: StreamDecoder, at: int = 0) -> None:
        self.decoder, self.at = decoder, at

    def pass_by(self, token: int) -> int:
        """Where `token` begins; the ruler then stands behind it."""
        before = self.at
        self.at += len(self.decoder.push(token))
        return before


def finite(value: float) -> float:
    return round(value, 6) if math.isfinite(value) else LEAST


def logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    entries: Sequence[TopLogprobs | None],
    ruler: Ruler,
    as_ids: bool = False,
) -> dict[str, list[Any]]:
    """Of the completions API: four lists, one entry a token. ruler: stands before the first token
    and is moved behind the last. A token without an entry (the first of a prompt) has null."""
    texts, top, offsets = [], [], []
    for token, entry in zip(tokens, entries, strict=False):
        texts.append(spelt(tokenizer, token, as_ids))
        offsets.append(ruler.pass_by(token))
        if entry is None:
            top.append(None)
            continue
        table: dict[str, float] = {}
        for other, value in [*entry[1], (token, entry[0])]:
            table.setdefault(spelt(tokenizer, other, as_ids), finite(value))
        top.append(table)
    own = [None if e is None else finite(e[0]) for e in entries]
    return {"tokens": texts, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], entries: Sequence[TopLogprobs]
) -> dict[str, Any]:
    """Of the chat API: an object a token."""

    def one(token: int, value: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": spelt(tokenizer, token), "logprob": finite(value), "bytes": list(data)}

    content = [
        {**one(token, entry[0]), "top_logprobs": [one(t, v) for t, v in entry[1]]}
        for token, entry in zip(tokens, entries, strict=True)
    ]
    return {"content": content, "refusal": None}


# Speculation


def speculation(
    jobs: Sequence[Job], samples: Iterable[int], detailed: bool = False
) -> dict[str, Any]:
    """What speculation did for the samples of all jobs together."""
    samples = list(samples)
    parts = [job.speculation(i) for job in jobs for i in samples]
    first = parts[0]
    total = {k: sum(p[k] for p in parts) for k in ("steps", "drafts", "drafted", "accepted")}
    emitted = sum(job.stats(i).emitted for job in jobs for i in samples)
    steps = total["steps"]
    reasons = [p["why_off"] for p in parts if p["why_off"]]
    block = {
        "drafter": first["drafter"],
        "verifier": first["verifier"],
        "promise": first["promise"],
        **total,
        "acceptance_length": round(emitted / steps, 4) if steps else 0.0,
        "accepted_per_position": _added([p["accepted_per_position"] for p in parts]),
        "why_off": reasons[0] if reasons else None,
    }
    if detailed:
        histograms = [job.stats(i).histogram for job in jobs for i in samples]
        block["acceptance_histogram"] = _added(histograms)
    return block


def metrics(job: Job, detailed: bool = False) -> dict[str, Any]:
    """The same of one sample, as vLLM spells it; steps that drafted nothing are left out there."""
    p, histogram = job.speculation(0), list(job.stats(0).histogram)
    drafts, accepted, drafted = p["drafts"], p["accepted"], p["drafted"]
    if histogram:
        histogram[0] = max(0, histogram[0] - (p["steps"] - drafts))
    return {
        "mean_acceptance_length": round(1 + accepted / drafts, 6) if drafts else 1.0,
        "draft_acceptance_rate": round(accepted / drafted, 6) if drafted else 0.0,
        "acceptance_histogram": histogram,
        "num_spec_steps": drafts,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": max(0, len(histogram) - 1),
    }


def _added(lists: Sequence[Sequence[int]]) -> list[int]:
    longest = max(map(len, lists), default=0)
    return [sum(values[i] for values in lists if i < len(values)) for i in range(longest)]
