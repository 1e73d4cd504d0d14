"""The best tree of every size: Sequoia's dynamic programme, with acceptance by depth."""

from __future__ import annotations

import numpy as np

Path = tuple[int, ...]  # ranks from the tip down: (0, 2) is the third child of the first child


class Plan:
    """Expected tokens, and the trees that give them.

    rates [D, R]: below a node of level d (0 = the tip) that verification has reached, the
    probability that the child of rank r is the one accepted; D levels, R children at most.
    ``tokens[n]``: most tokens that a tree of n drafted nodes is expected to emit, the bonus
    included. With f(d, m) the best of a subtree of m nodes whose root is of level d,

        f(D, m) = 1,   f(d, m) = 1 + max_b k(d, b, m - 1),
        k(d, b, m) = max_y k(d, b - 1, m - y) + rates[d, b - 1] f(d + 1, y):

    ranks are used from the first on, none left out. O(D R nodes^2).
    Paper: Chen et al., "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding" (2024).
    """

    def __init__(self, rates: np.ndarray, nodes: int) -> None:
        self.rates, self.nodes = np.asarray(rates, float), nodes
        depth, ranks = self.rates.shape
        m = np.arange(nodes + 1)
        rest = m[:, None] - m[None, :]  # [m, y]
        possible = (rest >= 0) & (m[None, :] > 0)
        rest = np.maximum(rest, 0)
        best = np.ones(nodes + 2)  # f(d, m), m nodes with the root
        self._kids: list[np.ndarray] = []  # by level: how many children the root gets, for each m
        self._share: list[np.ndarray] = []  # by level [R, m]: nodes in the subtree of that child
        for d in range(depth - 1, -1, -1):
            few = np.full(nodes + 1, -np.inf)
            few[0] = 0.0
            table, share = [np.zeros(nodes + 1)], np.zeros((ranks, nodes + 1), int)
            for r in range(ranks):
                gain = self.rates[d, r] * best[: nodes + 1]
                value = np.where(possible, few[rest] + gain[None, :], -np.inf)
                share[r] = value.argmax(1)
                few = value.max(1)
                # more nodes than can be put to use are worth no less
                table.append(few)
            stacked = np.stack(table)
            self._kids.insert(0, stacked.argmax(0))
            self._share.insert(0, share)
            best = np.concatenate([[1.0], 1 + stacked.max(0)])
        self.tokens = best[1:]

    def tree(self, nodes: int) -> list[Path]:
        """The paths of the best tree of `nodes` nodes, parents and elder siblings first."""
        paths: list[Path] = []
        todo: list[tuple[Path, int]] = [((), min(nodes, self.nodes))]
        while todo:
            path, left = todo.pop(0)
            d = len(path)
            if d == len(self._kids) or left < 1:
                continue
            sizes = []
            for r in range(int(self._kids[d][left]) - 1, -1, -1):
                sizes.append(int(self._share[d][r][left]))
                left -= sizes[-1]
            for r, size in enumerate(reversed(sizes)):
                paths.append((*path, r))
                todo.append(((*path, r), size - 1))
        return paths
