"""What each rule accepts at one node with k children, from the two distributions alone.

All functions take p, q [V] float64 numpy arrays and k >= 1 and return the probability that one of
the children is accepted. They are exact but for `without_replacement` at large V and k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from foretell.lab.verifiers.bound import (
    best_independent,
    best_top_one,
    best_without_replacement,
)

EXACT = 1_000_000  # numbers that the exact walk over refused siblings may hold at once
SAMPLES = 500  # refused siblings that are drawn where that is too many

Acceptance = Callable[[np.ndarray, np.ndarray, int], float]


def independent(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """`specinfer`: siblings with replacement. A refusal says nothing about the next draw, and what
    it leaves of p does not depend on the refused token."""
    refused, rest = 1.0, p
    for _ in range(k):
        refused *= 1 - np.minimum(rest, q).sum()
        rest = np.maximum(rest - q, 0)
        if rest.sum() <= 0 or refused <= 0:
            return 1.0
        rest = rest / rest.sum()
    return float(1 - refused)


def k_seq(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """`spectr`: siblings with replacement, one scale rho for all."""
    import torch

    from foretell.verify.spectr import k_seq as rule

    rho, _ = rule(torch.from_numpy(p), torch.from_numpy(q), k)
    return float(1 - (1 - np.minimum(q, p / rho).sum()) ** k)


def without_replacement(p: np.ndarray, q: np.ndarray, k: int, seed: int = 0) -> float:
    """`rejection`: siblings without replacement.

    Follows every refused sibling with its probability; where that would be too many, a seeded
    sample of them (an unbiased estimate, as acceptances are still computed, not drawn).
    """
    random = np.random.default_rng(seed)
    weight, rest, left = np.ones(1), p[None], q[None]
    accepted = 0.0
    for i in range(k):
        chance = np.minimum(rest, left).sum(-1)
        accepted += float((weight * chance).sum())
        weight = weight * np.maximum(1 - chance, 0)
        if i == k - 1 or weight.sum() < 1e-15:
            break
        refused = np.maximum(left - rest, 0)
        after = np.maximum(rest - left, 0)
        after /= np.maximum(after.sum(-1, keepdims=True), 1e-300)
        refused /= np.maximum(refused.sum(-1, keepdims=True), 1e-300)
        branch, token = np.nonzero(refused * weight[:, None] > 0)
        if len(branch) * len(p) <= EXACT:
            weight = weight[branch] * refused[branch, token]
        else:
            share = weight / weight.sum()
            total = weight.sum()
            branch = random.choice(len(weight), SAMPLES, p=share)
            sums = refused.cumsum(-1)[branch]
            token = (sums < random.random((SAMPLES, 1)) * sums[:, -1:]).sum(-1)
            weight = np.full(SAMPLES, total / SAMPLES)
        rest, left = after[branch], left[branch].copy()
        left[np.arange(len(token)), token] = 0
        mass = left.sum(-1, keepdims=True)
        weight = np.where(mass[:, 0] > 0, weight, 0)  # the support is used up: nothing to try
        left /= np.maximum(mass, 1e-300)
    return min(1.0, accepted)


def best_path(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """`multipath` with chains of one token: the best-ranked of k draws, tested against its law."""
    import torch

    from foretell.verify.multipath import selection

    _, law, _ = selection(torch.from_numpy(p), torch.from_numpy(q), k, 0.0, 1.0)
    return float(np.minimum(p, law.numpy()).sum())


def most_probable(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """One-hot drafts, by whatever rule: the k most probable tokens of q."""
    return float(p[np.argsort(-q, kind="stable")[:k]].sum())


RULES: Mapping[str, tuple[Acceptance, str]] = MappingProxyType(
    {  # rule -> what it accepts, and how its children are drawn
        "specinfer": (independent, "independent"),
        "spectr": (k_seq, "independent"),
        "multipath": (best_path, "independent"),
        "rejection": (without_replacement, "without replacement"),
        "greedy-draft": (best_top_one, "top k-1 and one"),
        "one-hot": (most_probable, "top k"),
    }
)
BOUNDS: Mapping[str, Acceptance] = MappingProxyType(
    {  # way of drawing -> the most that any rule accepts
        "independent": best_independent,
        "without replacement": best_without_replacement,
        "top k-1 and one": best_top_one,
        "top k": most_probable,
    }
)
