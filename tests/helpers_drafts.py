"""Target and draft tables, and draft procedures - right and wrong ones - for the exact tests."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foretell.core.tree import Kind, TokenTree
from helpers_exact import Branch, Child, LazyTree, Prefix, Table


def table(seed: object, vocab: int, kind: str = "dense", total: int = 0) -> Table:
    """Random distributions with integer weights, one for every prefix.

    kind: dense (all positive), zeros (some zero), even / odd (support on even / odd ids only),
    point (all mass on one id). total: make the weights add up to it (0: they add up to anything).
    """
    made: dict[Prefix, Tensor] = {}

    def row(prefix: Prefix) -> Tensor:
        if prefix not in made:
            r = random.Random(f"{seed}/{prefix}")
            weights = [r.randint(1, 9) for _ in range(vocab)]
            if kind == "zeros":
                for i in r.sample(range(vocab), r.randint(0, vocab - 2)):
                    weights[i] = 0
            elif kind in ("even", "odd"):
                weights = [w if i % 2 == (kind == "odd") else 0 for i, w in enumerate(weights)]
            elif kind == "point":
                weights = [int(i == weights[0] % vocab) for i in range(vocab)]
            if total:
                cuts = sorted(r.sample(range(1, total), vocab - 1))
                weights = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
            made[prefix] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        return made[prefix]

    return row


def masked(p: Table, seed: object, vocab: int) -> Table:
    """p under a constraint that forbids some tokens, others after every prefix."""

    def row(prefix: Prefix) -> Tensor:
        r = random.Random(f"mask {seed}/{prefix}")
        banned = r.sample(range(vocab), r.randint(1, vocab - 2))
        weights = p(prefix).clone()
        weights[banned] = 0
        return weights / weights.sum()

    return row


def without_replacement(branch: Branch, q: Tensor, k: int) -> list[int]:
    """k different draws from q, in draw order (fewer where q's support is smaller)."""
    left, drawn = q.tolist(), []
    for _ in range(min(k, sum(w > 0 for w in left))):
        drawn.append(branch.choose(left))
        left[drawn[-1]] = 0.0
    return drawn


Grow = Callable[[Branch, Prefix, int], list[Child]]  # (branch, whole prefix, level) -> children


def sampled(q: Table, widths: Sequence[int]) -> Grow:
    """widths[level] children of each node, drawn from q without replacement."""

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        if level >= len(widths):
            return []
        row = q(prefix)
        drawn = without_replacement(branch, row, widths[level])
        return [(x, row, Kind.CANDIDATE) for x in drawn]

    return grow


def onehot(q: Table, widths: Sequence[int]) -> Grow:
    """The most probable tokens of q, as deterministic drafts."""

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        if level >= len(widths):
            return []
        best = q(prefix).topk(widths[level]).indices.tolist()
        return [(x, None, Kind.CANDIDATE) for x in best]

    return grow


def withheld(q: Table, widths: Sequence[int]) -> Grow:
    """Drawn from q, but handed over as one-hot drafts: lossless whatever drew them."""
    inner = sampled(q, widths)

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        return [(x, None, kind) for x, _, kind in inner(branch, prefix, level)]

    return grow


def independent(q: Table, widths: Sequence[int]) -> Grow:
    """Children drawn with replacement, duplicates included: each has a row of its own."""

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        if level >= len(widths):
            return []
        row = q(prefix)
        return [
            (branch.choose(row.tolist()), row.clone(), Kind.CANDIDATE) for _ in range(widths[level])
        ]

    return grow


def repeats_dead(children: list[Child]) -> list[Child]:
    """Repeated draws as the engine's drafters hand them over: DEAD, without a forward row."""
    seen: set[int] = set()
    result = []
    for x, row, kind in children:
        result.append((x, row, Kind.DEAD if x in seen else kind))
        seen.add(x)
    return result


def iid(q: Table, widths: Sequence[int]) -> Grow:
    """`Draw.IID`."""
    inner = independent(q, widths)
    return lambda branch, prefix, level: repeats_dead(inner(branch, prefix, level))


def paths(q: Table, count: int, length: int) -> Grow:
    """`Draw.PATHS`: `count` independent chains, merged into a trie."""
    through: dict[Prefix, int] = {}  # chains through a prefix, as last drawn

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        if level >= length:
            return []
        row, n = q(prefix), through[prefix] if level else count
        drawn = [branch.choose(row.tolist()) for _ in range(n)]
        for x in drawn:
            through[(*prefix, x)] = drawn.count(x)
        return repeats_dead([(x, row.clone(), Kind.CANDIDATE) for x in drawn])

    return grow


def top_one(q: Table, widths: Sequence[int]) -> Grow:
    """`Draw.TOP_ONE`: one draw off the most probable tokens, then those."""

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        if level >= len(widths):
            return []
        row = q(prefix)
        best = row.topk(widths[level] - 1).indices.tolist()
        rest = row.clone()
        rest[best] = 0
        children: list[Child] = [(x, None, Kind.CANDIDATE) for x in best]
        if rest.sum() > 0:
            rest = rest / rest.sum()
            children.insert(0, (branch.choose(rest.tolist()), rest, Kind.CANDIDATE))
        return children

    return grow


def mixed(q: Table, widths: Sequence[int], sampled_first: bool) -> Grow:
    """One retrieved (one-hot) child beside the sampled ones."""
    inner = sampled(q, widths)

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        drawn = inner(branch, prefix, level)
        if level >= len(widths):
            return []
        found: Child = ((len(prefix) * 2 + 1) % len(q(prefix)), None, Kind.CANDIDATE)
        return [*drawn, found] if sampled_first else [found, *drawn]

    return grow


def killing(inner: Grow, p: Table) -> Grow:
    """Children the target's constraint forbids are kept, DEAD."""

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        legal = p(prefix)
        return [
            (x, row, kind if legal[x] > 0 else Kind.DEAD)
            for x, row, kind in inner(branch, prefix, level)
        ]

    return grow


def lazily(grow: Grow) -> Callable[[Branch, Prefix], TokenTree]:
    """A draft procedure for `helpers_exact.round_law`."""

    def draft(branch: Branch, text: Prefix) -> TokenTree:
        return LazyTree(lambda path: grow(branch, (*text, *path), len(path)))

    return draft


def eagerly(grow: Grow) -> Callable[[Branch, Prefix], TokenTree]:
    """The same procedure, the whole tree drafted before it is verified."""

    def draft(branch: Branch, text: Prefix) -> TokenTree:
        tokens: list[int] = []
        parents: list[int] = []
        qrow: list[int] = []
        kinds: list[Kind] = []
        q: list[Tensor] = []
        paths: list[Prefix] = []
        frontier = [-1]
        while frontier:
            fresh = []
            for node in frontier:
                if node >= 0 and kinds[node] == Kind.DEAD:
                    continue
                path = paths[node] if node >= 0 else ()
                rows: dict[int, int] = {}
                for x, row, kind in grow(branch, (*text, *path), len(path)):
                    if row is not None and id(row) not in rows:
                        rows[id(row)] = len(q)
                        q.append(row)
                    fresh.append(len(tokens))
                    tokens.append(x)
                    parents.append(node)
                    qrow.append(-1 if row is None else rows[id(row)])
                    kinds.append(kind)
                    paths.append((*path, x))
            frontier = fresh
        stacked = torch.stack(q) if q else None
        tree = TokenTree.build([0], tokens, parents, qrow=qrow, q=stacked)
        tree.kind[1:] = kinds
        return tree

    return draft


def beams(q: Table, vocab: int, width: int, length: int) -> Callable[[Branch, Prefix], TokenTree]:
    """Stochastic beam search, in its discrete form: whole sequences arrive in the order of a draw
    without replacement; each level keeps the `width` prefixes that arrive first, in that order."""

    def draft(branch: Branch, text: Prefix) -> TokenTree:
        def mass(path: Prefix) -> float:
            weight = 1.0
            for i, x in enumerate(path):
                weight *= float(q((*text, *path[:i]))[x])
            return weight

        left = list(itertools.product(range(vocab), repeat=length))
        left = [s for s in left if mass(s) > 0]
        levels: list[list[Prefix]] = [[] for _ in range(length)]
        while left and any(len(kept) < width for kept in levels):
            arrived = left.pop(branch.choose([mass(s) for s in left]))
            for level, kept in enumerate(levels):
                if arrived[: level + 1] not in kept and len(kept) < width:
                    kept.append(arrived[: level + 1])
        place: dict[Prefix, int] = {(): -1}
        rows: dict[Prefix, int] = {}
        tokens, parents, qrow = [], [], []
        for kept in levels:
            for path in kept:
                place[path] = len(tokens)
                tokens.append(path[-1])
                parents.append(place[path[:-1]])
                qrow.append(rows.setdefault(path[:-1], len(rows)))
        stacked = torch.stack([q((*text, *path)) for path in rows])
        return TokenTree.build([0], tokens, parents, qrow=qrow, q=stacked)

    return draft
