"""The few statistics of the bench. Pure functions of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def spread(values: Sequence[float]) -> float | None:
    """(largest - smallest) / median; None for fewer than two values."""
    return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None


def bootstrap_ratio(
    ratios: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of the geometric mean of paired ratios, prompts drawn with replacement.

    None for fewer than two prompts.
    """
    if len(ratios) < 2:
        return None
    logs = np.log(np.asarray(ratios, np.float64))
    rng = np.random.default_rng(seed)
    means = logs[rng.integers(0, len(logs), (draws, len(logs)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(np.exp(low)), float(np.exp(high))


def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t for p > 0.5, by Hill's (1970) expansion for df > 2, else exact."""
    if df <= 0:
        return math.inf
    if df == 1:
        return math.tan(math.pi * (p - 0.5))
    if df == 2:
        a = 2 * p - 1
        return a * math.sqrt(2 / (1 - a * a))
    tail = 2 * (1 - p)
    a = 1 / (df - 0.5)
    b = 48 / (a * a)
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * df
    y = (d * tail) ** (2 / df)
    if y > 0.05 + a:
        x = statistics.NormalDist().inv_cdf(tail / 2)
        y = x * x
        if df < 5:
            c += 0.3 * (df - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = ((1 / (((df + 6) / (df * y) - 0.089 * d - 0.822) * (df + 2) * 3)
              + 0.5 / (df + 4)) * y - 1) * (df + 1) / (df + 2) + 1 / y  # fmt: skip
    return math.sqrt(df * y)


def wilcoxon(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of the signed-rank test that differences are symmetric around zero.

    Exact up to 25 pairs without ties, else the normal approximation with tie correction. Zeros are
    dropped; None when nothing is left.
    """
    values = [d for d in differences if d != 0]
    n = len(values)
    if not n:
        return None
    order = sorted(range(n), key=lambda i: abs(values[i]))
    ranks, at, ties = [0.0] * n, 0, 0
    while at < n:
        end = at
        while end < n and abs(values[order[end]]) == abs(values[order[at]]):
            end += 1
        for i in order[at:end]:
            ranks[i] = (at + end + 1) / 2
        ties += (end - at) ** 3 - (end - at)
        at = end
    plus = sum(r for r, v in zip(ranks, values, strict=True) if v > 0)
    total = n * (n + 1) / 2
    small = min(plus, total - plus)
    if n <= 25 and not ties:
        ways = [1] + [0] * int(total)  # ways[s]: sets of ranks 1..n that sum to s
        for rank in range(1, n + 1):
            for s in range(int(total), rank - 1, -1):
                ways[s] += ways[s - rank]
        return min(1.0, 2 * sum(ways[: int(small) + 1]) / 2**n)
    deviation = math.sqrt((n * (n + 1) * (2 * n + 1) - ties / 2) / 24)
    z = (small - total / 2 + 0.5) / deviation
    return min(1.0, 2 * statistics.NormalDist().cdf(z))


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within groups; None when no group has two values."""
    squares = freedom = 0.0
    for group in groups:
        if len(group) > 1:
            mean = statistics.fmean(group)
            squares += sum((v - mean) ** 2 for v in group)
            freedom += len(group) - 1
    return math.sqrt(squares / freedom) if freedom else None
