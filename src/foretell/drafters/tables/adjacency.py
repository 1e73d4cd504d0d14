"""What followed each token: the k likeliest successors of every vocabulary item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foretell.drafters.tables.ranks import RankStats, RankTree

PRIOR = (0.45, 0.13, 0.07, 0.045, 0.03, 0.022, 0.017, 0.013)
"""Share of tokens that were the candidate of rank r: where `RankStats` starts from."""


class Adjacency:
    """``int32 [V, k]``: ids + 1 of each token's successors, best first; 0 = none known.

    Pages that were never written cost no memory, so a table of one's own is cheap to begin.
    """

    __slots__ = ("rows", "stats")

    def __init__(self, vocab: int, k: int = 8) -> None:
        self.rows = np.zeros((vocab, k), np.int32)
        self.stats = RankStats((PRIOR + (0.01,) * k)[:k])

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def expand(self, root: int, shape: RankTree) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens of a tree below `root`; ([n] int64, kept [n] bool or None = all).

        A node is missing where its parent is, or has too few known successors.
        """
        found: list[int] = []  # ids + 1
        known: dict[int, list[int]] = {}  # rows that were read: tokens repeat within a tree
        for parent, rank in shape.steps:
            above = root + 1 if parent < 0 else found[parent]
            if not above:
                found.append(0)
                continue
            row = known.get(above)
            if row is None:
                row = known[above] = self.rows[above - 1].tolist()
            found.append(row[rank])
        tokens = np.array(found, np.int64)
        tokens -= 1
        return tokens, tokens >= 0 if 0 in found else None

    def put(self, tokens: np.ndarray, ids: np.ndarray) -> None:
        """Row tokens[i] becomes ids[i]; of a token named twice the later row stands."""
        self.rows[tokens, : ids.shape[1]] = ids + 1

    def learn(self, text: Sequence[int]) -> None:
        """Put what followed each token in `text` first in its row, the most recent foremost."""
        k = self.rows.shape[1]
        a, b = np.asarray(text[:-1], np.int64), np.asarray(text[1:], np.int64)
        if not len(a):
            return
        _, last = np.unique((a * len(self.rows) + b)[::-1], return_index=True)
        at = len(a) - 1 - last  # last occurrence of every pair
        at = at[np.lexsort((-at, a[at]))]
        tokens, first, count = np.unique(a[at], return_index=True, return_counts=True)
        nth = np.arange(len(at)) - np.repeat(first, count)
        at, nth, row = at[nth < k], nth[nth < k], np.repeat(np.arange(len(tokens)), count)[nth < k]
        wide = np.zeros((len(tokens), 2 * k), np.int32)
        wide[row, nth] = b[at] + 1
        wide[:, k:] = self.rows[tokens]
        same = (wide[:, :, None] == wide[:, None, :]) & np.tri(2 * k, k=-1, dtype=bool)
        drop = same.any(2) | (wide == 0)
        order = np.argsort(drop, axis=1, kind="stable")[:, :k]
        wide[drop] = 0
        self.rows[tokens] = np.take_along_axis(wide, order, 1)

    def rank(self, token: int, successor: int) -> int:
        """Place of `successor` among the candidates of `token`; k when it is none of them."""
        row = self.rows[token].tolist()
        return row.index(successor + 1) if successor + 1 in row else len(row)
