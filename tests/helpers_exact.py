"""Exact laws of random procedures: every random draw branches, with its exact probability.

`outcomes(run)` calls ``run(branch)`` once for every combination of random outcomes. `Branch` has
the methods that verifiers may use (`core.protocols.Draws`) and, for draft procedures, `choose`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretell.core.feedback import Verdict
from foretell.core.tree import Kind, TokenTree

Prefix = tuple[int, ...]
Table = Callable[[Prefix], Tensor]  # prefix -> distribution [V] float64


class Branch:
    """One path through the tree of random outcomes; replays `script`, then takes first branches."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.at, self.probability = script, 0, 1.0
        self.todo: list[list[int]] = []  # scripts of the branches not taken

    def choose(self, weights: Sequence[float]) -> int:
        """An index, with probability proportional to its weight; weight 0 never comes up."""
        total = float(sum(weights))
        assert total > 0, "nothing to choose from"
        possible = [i for i, w in enumerate(weights) if w > 0]
        if self.at < len(self.script):
            taken = self.script[self.at]
        else:
            taken = possible[0]
            self.todo += [[*self.script, other] for other in possible[1:]]
            self.script = [*self.script, taken]
        self.at += 1
        self.probability *= weights[taken] / total
        return taken

    def flip(self, p: float, w: float, position: int = 0, index: int = 0) -> bool:
        chance = 0.0 if p <= 0 else 1.0 if p >= w else p / w
        return self.choose([1 - chance, chance]) == 1

    def pick(self, p: Tensor, position: int = 0) -> int:
        return self.choose(p.tolist())


def outcomes(run: Callable[[Branch], Hashable]) -> dict[Any, float]:
    """The law of what `run` returns."""
    law: dict[Any, float] = defaultdict(float)
    todo: list[list[int]] = [[]]
    while todo:
        branch = Branch(todo.pop())
        result = run(branch)
        law[result] += branch.probability
        todo += branch.todo
    return dict(law)


def joint(p: Table, length: int, prefix: Prefix = ()) -> dict[Prefix, float]:
    """The law of the first `length` tokens, those of `prefix` given."""
    law = {prefix: 1.0}
    for _ in range(length - len(prefix)):
        law = {
            (*s, x): w * px
            for s, w in law.items()
            for x, px in enumerate(p(s).tolist())
            if w * px > 0
        }
    return law


def extend(law: dict[Prefix, float], p: Table, length: int) -> dict[Prefix, float]:
    """Continue (or cut) every sequence of a law to `length` tokens with the conditionals of p."""
    result: dict[Prefix, float] = defaultdict(float)
    for s, w in law.items():
        for longer, v in joint(p, length, s[:length]).items():
            result[longer] += w * v
    return dict(result)


def total_variation(a: dict[Any, float], b: dict[Any, float]) -> float:
    return sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in a.keys() | b.keys()) / 2


class TableRows:
    """Target rows read from a table: what a verifier sees (`core.protocols.TargetRows`)."""

    host = True

    def __init__(self, p: Table, tree: TokenTree, prefix: Prefix = ()) -> None:
        self.p, self.tree, self.prefix = p, tree, prefix
        self.deterministic = False

    def probs(self, nodes: Sequence[int], read: Sequence[int] | None = None) -> Tensor:
        assert read is None, "a table has no rows of riders"
        assert all(self.tree.kind[n] != Kind.DEAD for n in nodes), "nothing computes DEAD rows"
        return torch.stack([self.p((*self.prefix, *self.tree.path_tokens(n))) for n in nodes])

    def greedy(self, nodes: Sequence[int]) -> list[int]:
        return self.probs(nodes).argmax(-1).tolist()

    def hidden(self, tap: Hashable, nodes: Sequence[int]) -> Tensor:
        raise AssertionError("a table has no hidden states")


Child = tuple[int, Tensor | None, Kind]  # token, the q row it was drawn from, kind


class LazyTree(TokenTree):
    """A tree whose children are drafted when the verifier looks at them.

    The law of the output is that of the whole tree drafted beforehand, as long as what is drafted
    below a node depends on that node's path only; unlike it, it can be enumerated.
    """

    def __init__(self, grow: Callable[[Prefix], list[Child]]) -> None:
        base = TokenTree.context([0])
        super().__init__(base.tokens, base.parent, base.kind, base.depth, np.array([-1]))
        self.grow, self.grown = grow, {}  # type: ignore[misc]

    def children(self, node: int) -> list[int]:
        if node not in self.grown:
            fresh = []
            dead = self.kind[node] == Kind.DEAD
            for token, q, kind in [] if dead else self.grow(tuple(self.path_tokens(node))):
                row = -1
                if q is not None:
                    same = [] if self.q is None else [i for i, r in enumerate(self.q) if r is q]
                    if not same:
                        self.q = [*(self.q or []), q]  # type: ignore[misc, list-item]
                    row = same[0] if same else len(self.q) - 1  # type: ignore[arg-type]
                fresh.append(len(self.tokens))
                self.tokens = np.append(self.tokens, token)
                self.parent = np.append(self.parent, node)
                self.kind = np.append(self.kind, np.int8(kind))
                self.depth = np.append(self.depth, self.depth[node] + 1)
                self.qrow = np.append(self.qrow, row)  # type: ignore[arg-type]
            self.grown[node] = fresh
        return self.grown[node]


Verify = Callable[[TokenTree, TableRows, Branch, int], Verdict]
Draft = Callable[[Branch, Prefix], list[Child]]  # children below a prefix that may be extended


def round_law(
    verify: Verify, draft: Callable[[Branch, Prefix], TokenTree], p: Table, rounds: int = 1
) -> dict[Prefix, float]:
    """The law of what `rounds` rounds of drafting and verifying emit."""

    def run(branch: Branch) -> Prefix:
        text: Prefix = ()
        for _ in range(rounds):
            tree = draft(branch, text)
            verdict = verify(tree, TableRows(p, tree, text), branch, len(text))
            text += tuple(verdict.tokens)
        return text

    return outcomes(run)


def deviation(
    verify: Verify,
    draft: Callable[[Branch, Prefix], TokenTree],
    p: Table,
    horizon: int,
    rounds: int = 1,
) -> float:
    """Total variation between the output's law over `horizon` tokens and the target's."""
    law = round_law(verify, draft, p, rounds)
    assert abs(sum(law.values()) - 1) < 1e-9, "the enumeration lost some outcomes"
    return total_variation(extend(law, p, horizon), joint(p, horizon))
