"""Filters: which tokens of a distribution stay."""

from __future__ import annotations

from torch import Tensor

from foretell.core.params import SamplingParams

NEG = float("-inf")


def filter_logits(logits: Tensor, p: SamplingParams) -> Tensor:
    """top-k, top-p, min-p, typical-p, each on what the one before it left; [k, V] -> [k, V]."""
    if 0 < p.top_k < logits.shape[-1]:
        kth = logits.topk(p.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, NEG)
    if p.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        drop = mass.cumsum(-1) - mass >= p.top_p  # keep the token that crosses the line
        logits = logits.masked_fill(drop.scatter(-1, index, drop), NEG)
    if p.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < p.min_p * probs.amax(-1, keepdim=True), NEG)
    if p.typical_p < 1:
        logs = logits.log_softmax(-1)
        probs = logs.exp()
        entropy = -(probs * logs).nansum(-1, keepdim=True)
        surprise = (-logs - entropy).abs()
        ordered, index = surprise.sort(dim=-1, stable=True)
        mass = probs.gather(-1, index)
        drop = mass.cumsum(-1) - mass >= p.typical_p
        logits = logits.masked_fill(drop.scatter(-1, index, drop), NEG)
    return logits
