"""Cutting the drafts of a step down to what is worth its rows."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.core.costs import paying
from foretell.core.tree import TokenTree


def cut(
    trees: Sequence[TokenTree],
    paths: Sequence[Sequence[float]],
    costs: Sequence[float],
    rate: float,
) -> list[TokenTree]:
    """Of all drafts together as many of the likeliest tokens as pay.

    paths: of each tree that may be cut, a chain, the chance that it gets to its 1st, 2nd, .. token,
    falling; of others nothing. costs: seconds of a forward of 0, 1, 2, .. rows; with more rows a
    further one costs what the last ones did. rate: tokens per second that the machine makes anyway.
    """
    likely = sorted((chance for path in paths for chance in path), reverse=True)
    if not likely:
        return list(trees)
    others = sum(map(len, trees)) - len(likely)
    first = max(0, min(others, len(costs) - len(likely) - 1))
    n = paying(likely, costs[first : first + len(likely) + 1], rate)
    least = likely[n - 1] if n else 1.0 + likely[0]
    return [
        t if not path or path[-1] >= least else t.head(len(t) - sum(c < least for c in path))
        for t, path in zip(trees, paths, strict=True)
    ]
