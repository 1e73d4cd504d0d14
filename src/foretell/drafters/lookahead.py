"""Lookahead decoding: a Jacobi window beside the drafts fills a pool of n-grams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, Needs, Promise, SeqView
from foretell.core.rng import mix
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.tables.runs import Pool, prefix_tree

Levels = list[list[int]]  # m rows of W ids: row i, column j guesses the id at tip + 1 + i + j


def shifted(levels: Levels, by: int, guess: Callable[[int], int]) -> Levels:
    """The window `by` positions further on. A column that comes in is the last one moved on by a
    token: (i, W) and (i + 1, W - 1) are the same position. guess: the id after an id."""
    levels = [list(row) for row in levels]
    for _ in range(by):
        ends = [row[-1] for row in levels]
        for row, end in zip(levels, [*ends[1:], guess(ends[-1])], strict=True):
            row.append(end)
            del row[0]
    return levels


@dataclass(slots=True)
class Asked:
    """The window that the target is reading in this step."""

    levels: Levels
    first: int  # its first node
    base: int  # committed ids before it


@dataclass(slots=True)
class LookaheadState:
    pool: Pool
    asked: Asked | None = None
    levels: Levels = field(default_factory=list)  # [] = start from the text
    base: int = 0  # committed ids when `levels` hung off the tip


class Lookahead:
    """In one forward the target verifies up to `guesses` n-grams from a pool, and computes one
    Jacobi iteration of a window of `window` columns and `ngram` - 1 rows, which fills the pool.

    The n-grams behind the last token, merged by prefix, are CANDIDATE nodes. The window is RIDER
    nodes: (0, j) hangs off (0, j - 1), (i, j) off (i - 1, j), so that a cell sees its column above
    it and the first row up to that column. The argmax behind the last row is the next row; with
    the column above it, it is an n-gram. The pool starts with the n-grams of the text. A window
    costs window * (ngram - 1) rows a step: it pays where rows are nearly free.

    Paper: Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding"
    (2024). One-hot drafts: keeps the promise of the verifier.
    """

    name = "lookahead"
    promise = Promise.EXACT
    paper = "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding"
    summary = "n-grams from a Jacobi window that the target computes beside the drafts"
    needs = Needs(logits=True)
    shapes = frozenset({"chain", "tree", "onehot"})
    own_trees_only = True  # it reads the rows of its own window

    def __init__(self, window: int = 5, ngram: int = 4, guesses: int = 5, pool: int = 4096) -> None:
        """pool: most ids with runs behind them. window=0: the n-grams of the text alone."""
        if ngram < 2 or window < 0 or guesses < 1 or pool < 1:
            raise InputError("lookahead needs ngram >= 2, window >= 0, guesses >= 1 and pool >= 1.")
        self.window, self.ngram, self.guesses, self.pool = window, ngram, guesses, pool

    def begin(self, view: SeqView) -> LookaheadState:
        return LookaheadState(Pool(self.ngram - 1, self.guesses, self.pool))

    def propose(
        self,
        states: Sequence[LookaheadState],
        views: Sequence[SeqView],
        budgets: Sequence[Budget],
    ) -> list[TokenTree]:
        return [self._one(s, v, b) for s, v, b in zip(states, views, budgets, strict=True)]

    def _one(self, state: LookaheadState, view: SeqView, budget: Budget) -> TokenTree:
        state.asked = None
        if budget.none:
            return TokenTree.context(view.pending)
        state.pool.extend(view.tokens)
        runs = state.pool.newest(view.tokens[-1])
        tokens, parents = prefix_tree(runs, budget.nodes, budget.depth, budget.branching)
        drafted, room = len(tokens), budget.nodes - len(tokens)
        if self.window and budget.branching > 1:
            levels = self._window(state, view.tokens)
            rows = len(levels)
            columns = min(self.window, room // rows, budget.depth - rows + 1)
            if columns > 0:
                levels = [row[:columns] for row in levels]
                first = len(view.pending) + drafted
                state.asked = Asked(levels, first, len(view.tokens))
                for i, row in enumerate(levels):
                    above = drafted + (i - 1) * columns
                    tokens += row
                    parents += [
                        (above + j if i else drafted + j - 1 if j else -1) for j in range(columns)
                    ]
        tree = TokenTree.build(view.pending, tokens, parents)
        tree.kind[tree.n_context + drafted :] = Kind.RIDER
        return tree

    def _window(self, state: LookaheadState, tokens: list[int]) -> Levels:
        """The window as it hangs off the last of `tokens`."""
        n, by = len(tokens), len(tokens) - state.base
        if not state.levels or by > self.window:
            return [[tokens[mix(n + j) % n] for j in range(self.window)]]

        def guess(token: int) -> int:
            runs = state.pool.newest(token)
            return runs[0][0] if runs else tokens[mix(token + n) % n]

        return shifted(state.levels, by, guess)

    def observe(self, states: Sequence[LookaheadState], feedback: Sequence[Feedback]) -> None:
        for state, f in zip(states, feedback, strict=True):
            if state.asked is not None and f.verdict.tokens:
                self._learn(state, state.asked, f)
            state.asked = None

    def _learn(self, state: LookaheadState, asked: Asked, f: Feedback) -> None:
        """Take the next row of the window, and its n-grams once all rows are there."""
        levels, width = asked.levels, len(asked.levels[0])
        last = asked.first + (len(levels) - 1) * width
        nodes = list(range(last, last + width))
        if not all(f.logits.has(n) for n in nodes):
            return
        levels, base = [*levels, f.logits.argmax(nodes)], asked.base
        if len(levels) == self.ngram:
            for column in zip(*levels, strict=True):
                state.pool.add(column[0], column[1:])
            levels, base = levels[1:], base + 1
        while len(levels[0]) < self.window:  # a small budget cut it
            ends = [row[-1] for row in levels]
            for row, end in zip(levels, [*ends[1:], ends[-1]], strict=True):
                row.append(end)
        state.levels, state.base = levels, base

    def end(self, state: LookaheadState) -> None:
        """Nothing to free."""
