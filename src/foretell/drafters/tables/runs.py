"""A pool of runs of tokens, and the tree of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Pool:
    """first id -> the latest `guesses` runs of `length` ids seen behind it; at most `keys` ids."""

    length: int
    guesses: int
    keys: int
    runs: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)  # newest last
    known: int = 0  # runs of the text that end before this index are in

    def add(self, first: int, run: tuple[int, ...]) -> None:
        held = self.runs.pop(first, [])
        if run in held:
            held.remove(run)
        self.runs[first] = [*held, run][-self.guesses :]
        if len(self.runs) > self.keys:
            del self.runs[next(iter(self.runs))]

    def extend(self, tokens: Sequence[int]) -> None:
        """Enter the runs of the committed text."""
        for end in range(max(self.known, self.length + 1), len(tokens) + 1):
            first = end - self.length - 1
            self.add(tokens[first], tuple(tokens[first + 1 : end]))
        self.known = max(self.known, len(tokens) + 1)

    def newest(self, first: int) -> list[tuple[int, ...]]:
        return self.runs.get(first, [])[::-1]


def prefix_tree(
    runs: Sequence[Sequence[int]], nodes: int, depth: int, branching: int
) -> tuple[list[int], list[int]]:
    """(tokens, parents) of the runs with common beginnings merged; earlier runs matter more."""
    tokens: list[int] = []
    parents: list[int] = []
    below: dict[int, dict[int, int]] = {-1: {}}
    for run in runs:
        node = -1
        for token in run[:depth]:
            children = below[node]
            if token not in children:
                if len(tokens) >= nodes or len(children) >= branching:
                    break
                children[token] = len(tokens)
                below[len(tokens)] = {}
                tokens.append(token)
                parents.append(node)
            node = children[token]
    return tokens, parents
