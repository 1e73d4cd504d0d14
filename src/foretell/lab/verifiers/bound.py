"""The most that any lossless rule can accept: the optimal transport from drafts to target.

One level, k children: the best rule accepts 1 + min over token sets H of p(H) - Q(H), Q(H) being
the probability that all children lie in H (the dual of the transport problem). The minimum is
attained on a prefix of the tokens in descending order of q / p, so scanning V prefixes is enough.
Paper: Hu et al., "Towards Optimal Multi-draft Speculative Decoding" (2025). `transport` solves the
problem itself, without that theory, for tiny cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from foretell.core.errors import InputError

STEP = 0.2  # of the trapezoid rule over log time: the integrand is analytic, its error below 1e-12


def best_independent(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """For k children drawn from q with replacement; p, q [V]."""
    order = _by_ratio(p, q)
    return _least(p[order], np.minimum(np.cumsum(q[order]), 1.0) ** k)


def best_without_replacement(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """For k children drawn from q without replacement (all of q's support if that is smaller)."""
    order = _by_ratio(p, q)
    return _least(p[order], all_inside(q[order], min(k, int((q > 0).sum()))))


def best_top_one(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """For the k - 1 most probable tokens of q and one drawn from the rest of q."""
    top, rest = top_and_rest(q, k)
    return float(p[top].sum() + np.minimum(p, rest).sum())


def top_and_rest(q: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(the k - 1 most probable tokens, q without them [V], renormalised or all zero)."""
    top = np.argsort(-q, kind="stable")[: k - 1]
    rest = q.copy()
    rest[top] = 0
    return top, rest / rest.sum() if rest.sum() > 0 else rest


def all_inside(q: np.ndarray, k: int) -> np.ndarray:
    """[V]: for every prefix of q [V] the probability that k draws without replacement lie in it.

    Drawing without replacement is a race of exponential clocks with rates q. The k first ones are
    all of the prefix H iff at least k clocks of H ring before the first of the others, at a time T
    that is exponential with rate 1 - q(H): an integral over T, by the trapezoid rule in log T.
    """
    if k == 1:
        return np.minimum(np.cumsum(q), 1.0)
    log_t = np.arange(-32.0, 40.0, STEP)
    t = np.exp(log_t)
    rang = np.zeros((k, len(t)))  # probability that exactly j clocks of the prefix rang by t, j < k
    rang[0] = 1.0
    outside = np.maximum(1.0 - np.cumsum(q), 0.0)
    result, support = np.zeros(len(q)), int((q > 0).sum())
    inside = 0
    for n, rate in enumerate(q):
        if rate > 0:
            still = np.exp(-rate * t)
            rang[1:] = rang[1:] * still + rang[:-1] * (1 - still)
            rang[0] *= still
            inside += 1
        if inside == support or outside[n] < 1e-14:
            result[n:] = 1.0
            break
        density = outside[n] * t * np.exp(-outside[n] * t)
        result[n] = float(((1 - rang.sum(0)) * density).sum() * STEP)
    return np.clip(result, 0.0, 1.0)


def _by_ratio(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Tokens in descending order of q / p; those that neither distribution has come last."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(p > 0, q / p, np.where(q > 0, np.inf, -1.0))
    return np.argsort(-ratio, kind="stable")


def _least(p: np.ndarray, inside: np.ndarray) -> float:
    """1 + min over prefixes, the empty one included."""
    return 1.0 + min(0.0, float((np.cumsum(p) - inside).min()))


Law = Mapping[tuple, float]


def transport(drafts: Law, target: Law, worth: Callable[[tuple, tuple], float]) -> float:
    """The largest expectation of worth(draft, text) >= 0 over all couplings of two finite laws.

    A linear programme with len(drafts) * len(target) unknowns; needs scipy.
    """
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError:
        raise InputError(
            "The bound over several levels needs scipy: pip install scipy, or use --depth 1."
        ) from None
    m, n = len(drafts), len(target)
    gain = np.array([worth(d, t) for d, t in itertools.product(drafts, target)])
    at = np.arange(m * n)
    rows = np.concatenate([at // n, m + at % n])
    sums = coo_array((np.ones(2 * m * n), (rows, np.concatenate([at, at])))).tocsr()
    right = np.array([*drafts.values(), *target.values()])
    # worth is never negative: a coupling of parts of both laws can be completed
    solved = linprog(-gain, A_ub=sums, b_ub=right, method="highs")
    if not solved.success:
        raise InputError(f"The linear programme has no solution: {solved.message}")
    return -float(solved.fun)


def longest_match(drafts: Sequence[Sequence[int]], text: Sequence[int]) -> int:
    """How many tokens of `text` the best of several drafted chains has right."""
    best = 0
    for chain in drafts:
        same = itertools.takewhile(lambda ab: ab[0] == ab[1], zip(chain, text, strict=False))
        best = max(best, sum(1 for _ in same))
    return best
