"""A toy grammar: which tokens may follow depends on what was said; some runs are forced."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from foretell.core.protocols import NodeMasks
from foretell.core.tree import TokenTree


def allowed_after(output: Sequence[int], vocab: int, seed: int = 0) -> list[int]:
    """Two thirds of the ids, others after every pair of ids; after some pairs exactly one."""
    tail = tuple(output[-2:])
    r = random.Random(f"grammar {seed}/{tail}")
    if len(output) >= 1 and r.random() < 0.2:
        return [r.randrange(vocab)]
    return sorted(r.sample(range(vocab), max(2, vocab * 2 // 3)))


class ToyGrammar:
    """The grammar bound to one sequence (`core.protocols.Constraint`)."""

    def __init__(self, vocab: int, seed: int = 0, force: bool = True) -> None:
        self.vocab, self.seed, self.force = vocab, seed, force
        self.output: list[int] = []

    def allowed(self, path: Sequence[int]) -> list[int]:
        return allowed_after([*self.output, *path], self.vocab, self.seed)

    def masks(self, tree: TokenTree) -> NodeMasks:
        bits = np.zeros((len(tree), (self.vocab + 31) // 32), np.uint32)
        legal = np.ones(len(tree), bool)
        for node in range(len(tree)):
            path = tree.path_tokens(node)
            if node > tree.tip:
                legal[node] = path[-1] in self.allowed(path[:-1])
            for t in self.allowed(path):
                bits[node, t // 32] |= np.uint32(1) << np.uint32(t % 32)
        return NodeMasks(bits.view(np.int32), legal)

    def forced(self) -> list[int]:
        run: list[int] = []
        while self.force and len(run) < 5 and len(self.allowed(run)) == 1:
            run += self.allowed(run)
        return run

    def advance(self, tokens: Sequence[int]) -> None:
        for t in tokens:
            assert t in self.allowed([]), f"{t} is not allowed after {self.output}"
            self.output.append(t)
