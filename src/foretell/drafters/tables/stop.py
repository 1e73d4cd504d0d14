"""Budgets that stop at a doubtful token, for drafts that are made before anybody asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def kept(
    stop: Callable[[Sequence[float]], bool], parents: Sequence[int], scores: Sequence[float]
) -> np.ndarray:
    """Which nodes stay when nothing is drafted below a node where `stop` says so. [n] bool.

    stop: asked with the scores from the tip down to a node, as in `Budget.stop`; the node itself
    stays.
    """
    n = len(parents)
    if parents == list(range(-1, n - 1)):
        end = next((i for i in range(1, n) if stop(scores[:i])), n)
        return np.arange(n) < end
    paths: dict[int, list[float]] = {-1: []}
    open_below = {-1}
    keep = np.zeros(n, bool)
    for i, parent in enumerate(parents):
        if parent in open_below:
            keep[i] = True
            paths[i] = [*paths[parent], scores[i]]
            if not stop(paths[i]):
                open_below.add(i)
    return keep
