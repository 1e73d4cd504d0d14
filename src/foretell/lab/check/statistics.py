"""Chi-square tests with their power stated. Pure Python: scipy is only needed to test this."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

Cell = TypeVar("Cell", bound=Hashable)


def gamma_q(a: float, x: float) -> float:
    """Upper regularised incomplete gamma function Q(a, x)."""
    if x <= 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:  # the series of P converges fast here
        term = total = 1 / a
        n = a
        while term > total * 1e-16:
            n += 1
            term *= x / n
            total += term
        return max(0.0, 1 - total * scale)
    tiny = 1e-300  # Lentz's continued fraction
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    h = d
    for i in range(1, 10_000):
        step = -i * (i - a)
        b += 2
        d = step * d + b
        c = b + step / c
        d = 1 / (d if abs(d) > tiny else tiny)
        c = c if abs(c) > tiny else tiny
        h *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return h * scale


def chi2_sf(x: float, df: float) -> float:
    """P(X > x) for a chi-square variable with df degrees of freedom."""
    return gamma_q(df / 2, x / 2)


def noncentral_chi2_sf(x: float, df: float, nc: float) -> float:
    """P(X > x) for a noncentral chi-square variable: a Poisson(nc / 2) mixture of central ones."""
    half = nc / 2
    if half == 0:
        return chi2_sf(x, df)
    spread = 10 * math.sqrt(half) + 20  # further terms weigh less than 1e-16
    total = 0.0
    for j in range(max(0, int(half - spread)), int(half + spread) + 1):
        weight = math.exp(j * math.log(half) - half - math.lgamma(j + 1))
        total += weight * chi2_sf(x, df + 2 * j)
    return min(1.0, total)


def chi2_critical(alpha: float, df: float) -> float:
    """The x with chi2_sf(x, df) == alpha."""
    return _bisect(lambda x: chi2_sf(x, df) - alpha)


def detectable_tv(n: int, df: int, alpha: float, power: float) -> float:
    """The total variation distance that n draws are sure to show, whatever its shape.

    A law at distance d has noncentrality n * sum((p' - p)^2 / p) >= 4 n d^2 (Cauchy-Schwarz), so
    the d whose bound just reaches the noncentrality that gives `power` at level `alpha`.
    """
    return min(1.0, math.sqrt(_noncentrality(df, alpha, power) / (4 * n))) if df else 1.0


@cache
def _noncentrality(df: int, alpha: float, power: float) -> float:
    """The noncentrality at which a test at level `alpha` has `power`."""
    critical = chi2_critical(alpha, df)
    return _bisect(lambda nc: power - noncentral_chi2_sf(critical, df, nc))


def _bisect(f: Callable[[float], float]) -> float:
    """The root of a decreasing function of x >= 0."""
    low, high = 0.0, 1.0
    while f(high) > 0:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether `runs` draws look like the law they should follow."""

    runs: int
    cells: int  # after pooling
    impossible: int  # draws of what the law gives probability 0
    statistic: float
    p_value: float
    tv: float  # distance between the observed and the expected law
    tv_noise: float  # what that distance is on average when nothing is wrong
    tv_detectable: float  # smallest distance this many draws show with probability `power`
    alpha: float
    power: float

    @property
    def passed(self) -> bool:
        return self.p_value >= self.alpha


def goodness_of_fit(
    observed: Mapping[Cell, int],
    expected: Mapping[Cell, float],
    alpha: float = 1e-4,
    power: float = 0.99,
) -> Fit:
    """One-sample chi-square test of counts against probabilities (which sum to 1).

    Cells that expect fewer than 5 draws are pooled. A single draw that the law excludes fails.
    """
    n = sum(observed.values())
    if n < 1:
        raise ValueError("no draws to test")
    impossible = sum(c for k, c in observed.items() if expected.get(k, 0.0) <= 0)
    pairs = [(observed.get(k, 0), n * p) for k, p in expected.items() if p > 0]
    tv = (sum(abs(o - e) for o, e in pairs) + impossible) / (2 * n)
    # E|o - e| of a binomial count is about sqrt(2 variance / pi), and never more than 2 e (1 - p).
    noise = sum(
        min(math.sqrt(2 * e * (1 - e / n) / math.pi), 2 * e * (1 - e / n)) for _, e in pairs
    ) / (2 * n)
    cells = pool(pairs)
    df = len(cells) - 1
    statistic = math.inf if impossible else sum((o - e) ** 2 / e for o, e in cells)
    p_value = 0.0 if impossible else chi2_sf(statistic, df) if df else 1.0
    return Fit(
        n,
        len(cells),
        impossible,
        statistic,
        p_value,
        tv,
        noise,
        detectable_tv(n, df, alpha, power),
        alpha,
        power,
    )


def pool(pairs: list[tuple[int, float]], least: float = 5.0) -> list[tuple[int, float]]:
    """Merge (observed, expected) cells until every one expects `least` or only one is left."""
    cells = sorted(pairs, key=lambda pair: pair[1])
    count, rest = 0, 0.0
    while cells and (cells[0][1] < least or 0 < rest < least):
        o, e = cells.pop(0)
        count, rest = count + o, rest + e
    return [*cells, (count, rest)] if rest > 0 else cells
