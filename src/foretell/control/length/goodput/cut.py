"""Cutting the drafts of a step down to what is worth its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from foretell.core.costs import paying
from foretell.core.tree import TokenTree


def cut(
    trees: Sequence[TokenTree],
    paths: Sequence[Sequence[float]],
    forward: Callable[[np.ndarray], np.ndarray],
    rate: float,
) -> list[TokenTree]:
    """Of all drafts together as many of the likeliest tokens as pay.

    paths: of each tree that may be cut, a chain, the chance that it gets to its 1st, 2nd, .. token,
    falling; of others nothing. forward(rows [n]) -> seconds [n]; rate: tokens per second that the
    machine makes anyway.
    """
    likely = sorted((chance for path in paths for chance in path), reverse=True)
    if not likely:
        return list(trees)
    others = sum(map(len, trees)) - len(likely)
    costs = forward(np.arange(others, others + len(likely) + 1.0)).tolist()
    n = paying(likely, costs, rate)
    least = likely[n - 1] if n else 1.0 + likely[0]
    return [
        t if not path or path[-1] >= least else t.head(len(t) - sum(c < least for c in path))
        for t, path in zip(trees, paths, strict=True)
    ]
