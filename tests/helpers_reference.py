"""Plain decoding, written the slow and obvious way: what speculation is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from foretell.core.params import SamplingParams
from foretell.core.rng import Purpose, SeqRng

Mask = Callable[[Sequence[int]], Iterable[int]]  # output so far -> allowed ids


def processed(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Iterable[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
    allowed: Iterable[int] | None = None,
) -> list[float]:
    """Logits after everything that comes before the temperature."""
    x = list(logits)
    p = params
    for t in range(len(x)):
        if (t in prompt or t in output) and p.repetition_penalty != 1:
            x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        times = list(output).count(t)
        x[t] -= p.frequency_penalty * times
        x[t] -= p.presence_penalty if times else 0.0
        x[t] += p.logit_bias.get(t, 0.0)
        if p.allowed_token_ids is not None and t not in p.allowed_token_ids:
            x[t] = -math.inf
    text = [*prompt, *output]
    for word in bad_words:
        head = list(word[:-1])
        if not head or text[-len(head) :] == head:
            x[word[-1]] = -math.inf
    if len(output) < p.min_tokens:
        for t in stop_ids:
            x[t] = -math.inf
    if allowed is not None:
        keep = set(allowed)
        x = [v if t in keep else -math.inf for t, v in enumerate(x)]
    return x


def softmax(x: Sequence[float]) -> list[float]:
    top = max(x)
    e = [math.exp(v - top) for v in x]
    return [v / sum(e) for v in e]


def filtered(x: Sequence[float], p: SamplingParams) -> list[float]:
    """The distribution after temperature, top-k, top-p, min-p and typical-p."""
    if p.temperature:
        x = [v / p.temperature for v in x]
    x = list(x)
    if 0 < p.top_k < len(x):
        kth = sorted(x, reverse=True)[p.top_k - 1]
        x = [v if v >= kth else -math.inf for v in x]
    if p.top_p < 1:
        probs, mass = softmax(x), 0.0
        keep = set()
        for t in sorted(range(len(x)), key=lambda t: (-probs[t], t)):
            if mass >= p.top_p:
                break
            keep.add(t)
            mass += probs[t]
        x = [v if t in keep else -math.inf for t, v in enumerate(x)]
    if p.min_p > 0:
        probs = softmax(x)
        x = [v if q >= p.min_p * max(probs) else -math.inf for v, q in zip(x, probs, strict=True)]
    if p.typical_p < 1:
        probs, mass = softmax(x), 0.0
        entropy = -sum(q * math.log(q) for q in probs if q > 0)
        keep = set()
        possible = [t for t in range(len(x)) if probs[t] > 0]
        for t in sorted(possible, key=lambda t: abs(-math.log(probs[t]) - entropy)):
            if mass >= p.typical_p:
                break
            keep.add(t)
            mass += probs[t]
        x = [v if t in keep else -math.inf for t, v in enumerate(x)]
    return softmax(x)


def law(model, prompt, output, params, stop_ids=(), bad_words=(), mask: Mask | None = None):
    """The distribution of the next token [V]."""
    logits = model.logits([*prompt, *output]).tolist()
    allowed = None if mask is None else mask(output)
    return filtered(processed(logits, params, prompt, output, stop_ids, bad_words, allowed), params)


def decode(
    model,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    seed: int | None = None,
    eos_ids: Iterable[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
    mask: Mask | None = None,
) -> list[int]:
    """Plain decoding with a table model; greedy, or sampled by the Gumbel trick."""
    ends = {*(() if params.ignore_eos else eos_ids), *params.stop_token_ids}
    rng = SeqRng(params.seed if seed is None else seed) if params.temperature else None
    output: list[int] = []
    room = min(params.max_tokens, model.spec.max_positions - len(prompt))
    while len(output) < room:
        logits = model.logits([*prompt, *output]).tolist()
        allowed = None if mask is None else mask(output)
        x = processed(logits, params, prompt, output, ends, bad_words, allowed)
        if rng is None:
            token = x.index(max(x))
        else:
            at = len(prompt) + len(output)
            noise = rng.race([at], Purpose.TARGET, len(x))[0].double()
            probs = torch.tensor(filtered(x, params), dtype=torch.float64)
            token = int((probs / noise).argmax())
        output.append(token)
        if token in ends:
            break
    return output
