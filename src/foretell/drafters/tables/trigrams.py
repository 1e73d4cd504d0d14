"""Which token followed which two, weighted; and a Monte-Carlo tree search over the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

PAIR, SUCCESSOR = 400, 100  # bytes of a pair (key, dict, slot) and of each of its successors
Successors = Callable[[int, int], list[tuple[int, float]]]
"""(token before, last token) -> (next token, chance), likeliest first."""


class TriGrams:
    """weights[a, b][c]: how often c followed a, b. With a limit, the pair touched longest ago goes
    first, and of a pair's successors only the `width` heaviest are kept."""

    __slots__ = ("limit", "pairs", "successors", "width")

    def __init__(self, limit: int = 0, width: int = 12) -> None:
        self.limit, self.width = limit, width
        self.pairs: dict[int, dict[int, float]] = {}  # a << 32 | b, in order of last use
        self.successors = 0

    @property
    def nbytes(self) -> int:
        """Memory it holds, estimated from above."""
        return PAIR * len(self.pairs) + SUCCESSOR * self.successors

    def add(self, tokens: Sequence[int], weight: float = 1.0, cap: float = math.inf) -> None:
        """Every token from the third on counts `weight` more after the two before it."""
        pairs, limited = self.pairs, self.limit > 0
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            key = a << 32 | b
            row = pairs.pop(key, None) if limited else pairs.get(key)
            if row is None:
                row = {}
            pairs[key] = row  # now the one touched last
            if c not in row:
                if limited and len(row) >= self.width:
                    del row[min(row, key=row.__getitem__)]
                    self.successors -= 1
                self.successors += 1
            row[c] = min(cap, row.get(c, 0.0) + weight)
            while limited and self.nbytes > self.limit:
                oldest = next(iter(pairs))
                self.successors -= len(pairs.pop(oldest))

    def add_all(self, documents: Iterable[Sequence[int]]) -> None:
        for d in documents:
            self.add(d)

    def row(self, a: int, b: int) -> dict[int, float]:
        return self.pairs.get(a << 32 | b, {})


def mixed(tables: Sequence[TriGrams], width: int) -> Successors:
    """Successors by the sum of several tables' weights; ties go to the lowest id."""

    def successors(a: int, b: int) -> list[tuple[int, float]]:
        rows = [r for r in (t.row(a, b) for t in tables) if r]
        if not rows:
            return []
        if len(rows) == 1 and len(rows[0]) == 1:
            return [(next(iter(rows[0])), 1.0)]
        weights = dict(rows[0])
        for row in rows[1:]:
            for c, w in row.items():
                weights[c] = weights.get(c, 0.0) + w
        best = sorted(weights.items(), key=lambda cw: (-cw[1], cw[0]))[:width]
        total = sum(w for _, w in best)
        return [(c, w / total) for c, w in best]

    return successors


@dataclass(slots=True)
class Search:
    """A search tree: lists over its nodes, node 0 the root. `chance` is that of a node below its
    parent, `value` the sum of the rewards seen through it."""

    token: list[int] = field(default_factory=lambda: [-1])
    parent: list[int] = field(default_factory=lambda: [-1])
    level: list[int] = field(default_factory=lambda: [0])
    chance: list[float] = field(default_factory=lambda: [1.0])
    visits: list[int] = field(default_factory=lambda: [0])
    value: list[float] = field(default_factory=lambda: [0.0])
    children: list[list[int] | None] = field(default_factory=lambda: [None])  # None: not expanded
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def expand(self, node: int, successors: Successors, depth: int) -> list[int]:
        """Children of `node`, added on the first call; none at full depth."""
        known = self.children[node]
        if known is not None:
            return known
        fresh: list[int] = []
        if self.level[node] < depth:
            a, b = self.pairs[node]
            for c, p in successors(a, b):
                fresh.append(len(self.token))
                self.token.append(c)
                self.parent.append(node)
                self.level.append(self.level[node] + 1)
                self.chance.append(p)
                self.visits.append(0)
                self.value.append(0.0)
                self.children.append(None)
                self.pairs.append((b, c))
        self.children[node] = fresh
        return fresh


C1, C2 = 32.0, 8.0  # exploration: its weight, and how fast that grows with visits


def monte_carlo(
    successors: Successors, pair: tuple[int, int], depth: int, nodes: int, iterations: int
) -> list[tuple[int, int, int, float]]:
    """A draft of up to `nodes` nodes below the token pair: (token, parent or -1, level, chance).

    Every iteration descends by value and curiosity, score / visits + (C1 + ln((N + C2 + 1) / C2))
    chance sqrt(N) / (1 + visits), with N the parent's visits, until it meets a node it has not been
    to; plays on from there, each token drawn by its chance; and credits 1 + the sum of the chances
    on its way to all nodes above. The most visited nodes are the draft. Where the whole table below
    the pair fits into `nodes`, there is nothing to search. The draws depend on the pair alone.
    """
    tree = Search(pairs=[pair])
    frontier = [0]
    while frontier and len(tree.token) <= nodes:
        frontier = [c for n in frontier for c in tree.expand(n, successors, depth)]
    if len(tree.token) - 1 <= nodes and not frontier:
        return _taken(tree, list(range(1, len(tree.token))))
    state = (pair[0] * 0x9E3779B1 + pair[1] * 0x85EBCA77 + 1) & 0xFFFFFFFF
    visits, value, chance = tree.visits, tree.value, tree.chance
    for _ in range(iterations):
        node, reward = 0, 1.0
        while True:
            below = tree.expand(node, successors, depth)
            if not below:
                break
            if len(below) == 1:
                node = below[0]
            else:
                n = visits[node]
                curiosity = (C1 + math.log((n + C2 + 1) / C2)) * math.sqrt(n)
                best, most = below[0], -1.0
                for c in below:
                    v = visits[c]
                    if not v:  # children come likeliest first: so do first visits
                        best = c
                        break
                    u = value[c] / v + curiosity * chance[c] / (1 + v)
                    if u > most:
                        best, most = c, u
                node = best
            reward += chance[node]
            if not visits[node]:
                break
        a, b = tree.pairs[node]
        for _ in range(depth - tree.level[node]):
            nexts = successors(a, b)
            if not nexts:
                break
            state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
            left = state / 4294967296.0
            token, p = nexts[-1]
            for token, p in nexts:  # noqa: B007
                left -= p
                if left < 0:
                    break
            reward += p
            a, b = b, token
        while node >= 0:
            visits[node] += 1
            value[node] += reward
            node = tree.parent[node]
    seen = [n for n in range(1, len(tree.token)) if visits[n]]
    seen.sort(key=lambda n: (-visits[n], tree.level[n], n))
    return _taken(tree, sorted(seen[:nodes]))


def _taken(tree: Search, nodes: list[int]) -> list[tuple[int, int, int, float]]:
    index = {0: -1, **{n: i for i, n in enumerate(nodes)}}
    return [(tree.token[n], index[tree.parent[n]], tree.level[n], tree.chance[n]) for n in nodes]
