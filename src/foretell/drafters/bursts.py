"""Letting several drafters walk over the same text, each in steps of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import Tap
from foretell.core.feedback import Feedback, Rows, Verdict
from foretell.core.tree import Kind, TokenTree

STEPS = 8  # of the player, that a burst lasts


def judge(tree: TokenTree, tokens: Sequence[int]) -> Verdict | None:
    """What a step with this one-hot tree emits where the text goes on with `tokens`. None: that
    cannot be told yet, for the text is not far enough."""
    path: list[int] = []
    node, refused = tree.tip, False
    nodes, parents, kinds = tree.tokens.tolist(), tree.parent.tolist(), tree.kind.tolist()
    for i in range(tree.n_context, len(nodes)):  # a child stands behind its parent
        if parents[i] == node and kinds[i] == Kind.CANDIDATE:
            if len(path) == len(tokens):
                break
            refused = nodes[i] != tokens[len(path)]
            if not refused:
                node = i
                path.append(i)
    if len(path) == len(tokens):
        return None
    return Verdict(path, list(tokens[: len(path) + 1]), len(path) + refused)


@dataclass(slots=True)
class Walk:
    """A drafter's own steps over the text of a burst, whoever plays. A step begins at `at`
    committed tokens and is over when the text has judged its tree."""

    at: int
    tree: TokenTree | None = None  # of the step under way
    seconds: float = 0.0  # of it
    spent: float = 0.0  # by the steps before it
    each: float = 0.0  # seconds of the last of them a token

    def step(self, tree: TokenTree, seconds: float) -> None:
        self.tree, self.seconds = tree, seconds

    def read(self, text: Sequence[int]) -> Verdict | None:
        """The text so far, from its beginning: what the step under way emits, if that is known."""
        if self.tree is None:
            return None
        verdict = judge(self.tree, text[self.at : self.at + len(self.tree)])
        if verdict is not None:
            self.tree, self.at = None, self.at + len(verdict.tokens)
            self.spent += self.seconds
            self.each = self.seconds / len(verdict.tokens)
        return verdict

    def stop(self, end: int) -> None:
        """The text ends here: the step under way came as far as it could."""
        if self.tree is not None:
            self.tree, self.at = None, end
            self.spent += self.seconds

    def until(self, end: int) -> float:
        """Seconds up to here: of the last step the share that lies before it."""
        return self.spent - max(0, self.at - end) * self.each


@dataclass(slots=True)
class Burst:
    """Some consecutive steps of the player in one sequence. The other drafters walk over their text
    after the fact, each shown only what stands before its own place."""

    player: int
    walks: list[Walk]
    start: int  # committed tokens
    steps: int = 0  # of the player, so far
    end: int = 0  # committed tokens behind the last of them

    @classmethod
    def begin(cls, player: int, count: int, at: int) -> Burst:
        return cls(player, [Walk(at) for _ in range(count)], at)

    @property
    def open(self) -> bool:
        """Whether the player's next step belongs to it."""
        return self.steps < STEPS

    def reach(self, text: Sequence[int]) -> int:
        """Walks go on up to here."""
        return self.end or len(text)

    def read(self, text: Sequence[int]) -> None:
        """After a step of the player."""
        if not self.open and not self.end:
            self.end = len(text)

    def stop(self, text: Sequence[int]) -> None:
        """The text ends here. (Were such bursts left out, those texts would be that take many
        steps.)"""
        self.end = self.end or len(text)
        for walk in self.walks:
            walk.stop(self.end)

    @property
    def over(self) -> bool:
        """Whether everybody has walked to the end."""
        return self.end > 0 and all(w.at >= self.end for w in self.walks)

    def seconds(self) -> list[float]:
        """That each drafter would have taken for the text."""
        return [w.until(self.end) for w in self.walks]


@dataclass(slots=True)
class Heard:
    """The target's rows behind the committed tokens of a burst, by how many those are, so that who
    walks over it can be told what a step of its own would have shown (but for the rows of refused
    nodes)."""

    logits: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[Tap, dict[int, Tensor]] = field(default_factory=dict)

    def hear(self, f: Feedback, at: int) -> None:
        """After each step, which began at `at` tokens: its rows are gone with the next forward."""
        nodes = [f.tree.tip, *f.verdict.path]
        self.logits.update(enumerate(f.logits[nodes].clone(), at))
        for tap, rows in f.hidden.items():
            self.hidden.setdefault(tap, {}).update(enumerate(rows[nodes].clone(), at))

    def feedback(self, at: int, tree: TokenTree, verdict: Verdict) -> Feedback | None:
        """Of a step that began at `at` committed tokens; None where rows are missing."""
        places = range(at, at + len(verdict.tokens))
        if any(place not in self.logits for place in places):
            return None
        row = np.full(len(tree), -1, np.int64)
        row[[tree.tip, *verdict.path]] = np.arange(len(places))

        def rows(kept: dict[int, Tensor]) -> Rows:
            return Rows(torch.stack([kept[place] for place in places]), row)

        hidden = {tap: rows(kept) for tap, kept in self.hidden.items()}
        return replace(without_rows(tree, verdict), logits=rows(self.logits), hidden=hidden)


def without_rows(tree: TokenTree, verdict: Verdict) -> Feedback:
    """Of a step that nobody saw."""
    path = [*range(tree.n_context), *verdict.path]
    nothing = Rows(torch.empty(0, 0), np.full(len(tree), -1, np.int64))
    return Feedback(list(verdict.tokens), path, tree, nothing, verdict)
