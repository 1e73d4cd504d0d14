"""Growing many drafts at once: one forward of the drafter for all that want rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from foretell.core.batch import Segment
from foretell.core.tree import counted
from foretell.drafters.trees.shape import Grower

Forward = Callable[[list[list[int]]], Tensor]


def grow_level_by_level(growers: Sequence[Grower], forward: Forward) -> int:
    """Ask every grower for its frontier, run the drafter once for all of them, hand the rows back,
    until none wants more; returns the number of forwards.

    forward: for each grower its frontier (maybe empty) -> raw logits [R, V], one row for each of
    those nodes, in that order.
    """
    rounds = 0
    while any(frontiers := [g.frontier() for g in growers]):
        logits = forward(frontiers)
        rounds += 1
        at = 0
        for grower, nodes in zip(growers, frontiers, strict=True):
            if nodes:
                grower.expand(logits[at : at + len(nodes)])
                at += len(nodes)
    return rounds


class Scratch:
    """Where the rows of growing drafts lie in one open transaction of the drafter's model.

    The first forward feeds, for each sequence, the committed ids that its cache lacks; every later
    one the nodes of a frontier, which see those ids and their own ancestors. Nothing of it is
    committed unless the drafter does so: rows 0..len(feed)-1 are the committed ids.
    """

    def __init__(
        self, growers: Sequence[Grower], feeds: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> None:
        """feeds[b]: at least one id; starts[b]: position of feeds[b][0], rows in the cache."""
        self.growers, self.feeds, self.starts = growers, feeds, starts
        self.used = [0] * len(growers)  # rows in the transaction so far
        self._row: list[dict[int, int]] = [{} for _ in growers]  # node -> its row there

    def segments(self, frontiers: Sequence[Sequence[int]]) -> list[Segment]:
        """The rows of the next forward; logits are asked for after each node of the frontiers."""
        return [self._segment(i, nodes) for i, nodes in enumerate(frontiers)]

    def _segment(self, i: int, nodes: Sequence[int]) -> Segment:
        g, feed, used = self.growers[i], self.feeds[i], self.used[i]
        if nodes and nodes[0] < 0:
            self.used[i] = len(feed)
            return chain_segment(feed, self.starts[i])
        n, row = len(nodes), self._row[i]
        ancestors = np.zeros((n, used + n), bool)
        ancestors[:, : len(feed)] = True
        for r, node in enumerate(nodes):
            row[node] = used + r
            ancestors[r, [row[a] for a in g.paths[node]]] = True
        self.used[i] += n
        base = self.starts[i] + len(feed) - 1
        tokens = np.asarray([g.tokens[x] for x in nodes], np.int64)
        positions = np.asarray([base + len(g.paths[x]) for x in nodes], np.int64)
        return Segment(tokens, positions, ancestors, np.arange(n))


def chain_segment(tokens: Sequence[int], start: int) -> Segment:
    """Rows for `tokens` from position `start` on; logits after the last."""
    n = len(tokens)
    ids = np.array(tokens, np.int64)
    return Segment(ids, counted(start, start + n), None, counted(n - 1, n))
