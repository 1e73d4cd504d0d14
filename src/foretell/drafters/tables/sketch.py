"""Drafts of tables before they are trees: lists, for whoever puts drafts together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from foretell.core.protocols import Budget, SeqView
from foretell.core.tree import Kind, TokenTree

Ids = Sequence[int] | np.ndarray


class Sketch(NamedTuple):
    """A one-hot draft of n nodes, parents first: token, parent (-1 = the tip), level (1 = child of
    the tip), and the score given that the parent is right, where there are scores."""

    tokens: Ids = ()
    parents: Ids = ()
    levels: Ids = ()
    scores: Sequence[float] | np.ndarray | None = None

    def tree(self, context: Sequence[int]) -> TokenTree:
        if not len(self.tokens):
            return TokenTree.context(context)
        return TokenTree.grown(context, *self)

    @classmethod
    def of(cls, tree: TokenTree) -> Sketch:
        """The candidates of a tree, with what hangs below others left out."""
        c, tip = tree.n_context, tree.tip
        found: list[int] = []
        place = {tip: -1}
        parents, kinds, depth = tree.parent.tolist(), tree.kind.tolist(), tree.depth.tolist()
        for i in range(c, len(tree)):
            if kinds[i] == Kind.CANDIDATE and parents[i] in place:
                place[i] = len(found)
                found.append(i)
        return cls(
            tree.tokens[found].tolist(),
            [place[parents[i]] for i in found],
            [depth[i] - depth[tip] for i in found],
            None if tree.score is None else tree.score[found].tolist(),
        )


NOTHING = Sketch()


def sketched(
    tokens: Ids,
    parents: Ids,
    levels: Ids,
    scores: Sequence[float] | np.ndarray | None = None,
    keep: np.ndarray | None = None,
    stop: Callable[[Sequence[float]], bool] | None = None,
) -> Sketch:
    """The nodes in `keep` (None = all), with their parents, that `stop` leaves."""
    if stop is not None and scores is not None and len(tokens):
        wanted = kept(stop, np.asarray(parents).tolist(), np.asarray(scores).tolist())
        keep = wanted if keep is None else keep & wanted
    if keep is not None and not keep.all():
        index = np.cumsum(keep) - 1
        above = np.asarray(parents)[keep]
        parents = np.where(above < 0, -1, index[above])
        tokens, levels = np.asarray(tokens)[keep], np.asarray(levels)[keep]
        scores = None if scores is None else np.asarray(scores)[keep]
    return Sketch(tokens, parents, levels, scores)


def kept(
    stop: Callable[[Sequence[float]], bool], parents: Sequence[int], scores: Sequence[float]
) -> np.ndarray:
    """Which nodes stay when nothing is drafted below a node where `stop` says so. [n] bool.

    stop: asked with the scores from the tip down to a node, as in `Budget.stop`; the node itself
    stays.
    """
    n = len(parents)
    if parents == list(range(-1, n - 1)):
        end = next((i for i in range(1, n) if stop(scores[:i])), n)
        return np.arange(n) < end
    paths: dict[int, list[float]] = {-1: []}
    open_below = {-1}
    keep = np.zeros(n, bool)
    for i, parent in enumerate(parents):
        if parent in open_below:
            keep[i] = True
            paths[i] = [*paths[parent], scores[i]]
            if not stop(paths[i]):
                open_below.add(i)
    return keep


class Sketches:
    """A drafter whose drafts are sketches."""

    def sketch(
        self, states: Sequence[Any], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[Sketch]:
        """As `propose`, without the contexts."""
        raise NotImplementedError

    def propose(
        self, states: Sequence[Any], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        found = self.sketch(states, views, budgets)
        return [s.tree(v.pending) for s, v in zip(found, views, strict=True)]
