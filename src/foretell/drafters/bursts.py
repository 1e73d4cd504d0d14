"""Letting several drafters walk over the same text, each in steps of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foretell.core.tree import Kind, TokenTree

STEPS = 8  # of the player, that a burst lasts


def got(tree: TokenTree, tokens: Sequence[int]) -> int:
    """How many tokens a step with this one-hot tree emits where the text goes on with `tokens`:
    those of its path, and one. 0: that cannot be told yet, for the text is not far enough."""
    node, n = tree.tip, 0
    nodes, parents, kinds = tree.tokens.tolist(), tree.parent.tolist(), tree.kind.tolist()
    for i in range(tree.n_context, len(nodes)):  # a child stands behind its parent
        if parents[i] == node and kinds[i] == Kind.CANDIDATE:
            if n == len(tokens):
                return 0
            if nodes[i] == tokens[n]:
                node, n = i, n + 1
    return n + 1


@dataclass(slots=True)
class Walk:
    """A drafter's own steps over the text of a burst, whoever plays. A step begins at `at`
    committed tokens and stands for the text up to where the next one begins."""

    at: int = 0
    tree: TokenTree | None = None  # of the last step, until the text has judged it
    seconds: float = 0.0  # of the last step
    emitted: int = 0  # by the last step, once judged
    spent: float = 0.0  # seconds, on the text before `at`

    def free(self, at: int) -> bool:
        """Whether its next step may begin here."""
        return self.tree is None and self.at + self.emitted <= at

    def step(self, at: int, tree: TokenTree, seconds: float) -> None:
        self.close(at)
        self.at, self.tree, self.seconds, self.emitted = at, tree, seconds, 0

    def read(self, text: Sequence[int]) -> None:
        """The text so far, from its beginning."""
        if self.tree is not None:
            self.emitted = got(self.tree, text[self.at : self.at + len(self.tree)])
            if self.emitted:
                self.tree = None

    def close(self, at: int) -> None:
        """The last step stands for the text up to here, be that less or more than it emitted."""
        if self.emitted:
            self.spent += self.seconds * (at - self.at) / self.emitted


@dataclass(slots=True)
class Burst:
    """Some consecutive steps of the player in one sequence, over which all drafters walk."""

    walks: list[Walk]
    start: int = 0  # committed tokens
    steps: int = 0  # of the player, so far
    end: int = 0  # committed tokens behind the last of them

    @property
    def open(self) -> bool:
        """Whether drafters are still asked."""
        return self.steps < STEPS

    def read(self, text: Sequence[int]) -> bool:
        """Judges by the text so far, after each of the player's steps; True when all is judged."""
        for walk in self.walks:
            walk.read(text)
        if self.open:
            return False
        self.end = self.end or len(text)
        if any(w.tree is not None for w in self.walks):
            return False
        for walk in self.walks:
            walk.close(self.end)
        return True
