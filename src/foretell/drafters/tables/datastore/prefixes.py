"""From many continuations to one tree."""

from __future__ import annotations

import numpy as np


def heaviest_prefixes(
    rows: np.ndarray, nodes: int, vocab: int, branching: int = 1 << 30, ordered: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The `nodes` most frequent prefixes of `rows` [r, d] as a tree: tokens, parents (-1 = root),
    levels, and how often each followed its parent; [n] each, parents first, the heavier of two
    siblings first. A token >= vocab ends its row. branching: most children of a node; ordered:
    equal prefixes are neighbours, as in the rows of one suffix array."""
    if not ordered:
        rows = rows[np.lexsort(rows.T[::-1])]
    r, d = rows.shape
    alive = np.logical_and.accumulate(rows < vocab, axis=1)
    change = np.ones((r, d), bool)
    change[1:] = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
    change = change.T  # [d, r]: level by level
    ident = np.cumsum(change.ravel()).reshape(d, r) - 1
    level, row = np.nonzero(change)
    bounds = np.append(np.flatnonzero(change.ravel()), d * r)
    count = np.diff(bounds)  # runs end where the next begins; every level begins anew
    parent = np.where(level > 0, ident[level - 1, row], -1)
    fits = alive.T[level, row]
    if branching < len(count):
        order = np.lexsort((np.arange(len(count)), -count, parent))
        place = np.arange(len(order)) - np.searchsorted(parent[order], parent[order])
        narrow = np.empty(len(order), bool)
        narrow[order] = place < branching
        for a in range(d):  # a child goes with its parent
            at = np.flatnonzero(level == a)
            fits[at] &= narrow[at] & ((parent[at] < 0) | fits[parent[at]])
    order = np.flatnonzero(fits)
    order = order[np.lexsort((order, level[order], -count[order]))][:nodes]
    order = order[np.lexsort((order, -count[order], level[order]))]
    index = np.full(len(count) + 1, -1)
    index[order] = np.arange(len(order))
    above = np.where(parent[order] < 0, r, count[parent[order]])
    tokens = rows[row[order], level[order]]
    return tokens, index[parent[order]], level[order] + 1, count[order] / above
