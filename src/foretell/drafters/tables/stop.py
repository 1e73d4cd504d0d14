"""Budgets that stop at a doubtful token, for drafts that are made before anybody asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from foretell.core.tree import TokenTree

Ids = Sequence[int] | np.ndarray


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


def grown(
    context: Sequence[int],
    tokens: Ids,
    parents: Ids,
    levels: Ids,
    scores: Sequence[float] | np.ndarray | None = None,
    keep: np.ndarray | None = None,
    stop: Callable[[Sequence[float]], bool] | None = None,
) -> TokenTree:
    """`TokenTree.grown` with the nodes in `keep` (None = all), with their parents, that `stop`
    leaves."""
    if stop is not None and scores is not None and len(tokens):
        wanted = kept(stop, np.asarray(parents).tolist(), np.asarray(scores).tolist())
        keep = wanted if keep is None else keep & wanted
    if keep is not None and not keep.all():
        index = np.cumsum(keep) - 1
        above = np.asarray(parents)[keep]
        parents = np.where(above < 0, -1, index[above])
        tokens, levels = np.asarray(tokens)[keep], np.asarray(levels)[keep]
        scores = None if scores is None else np.asarray(scores)[keep]
    return TokenTree.grown(context, tokens, parents, levels, scores)
