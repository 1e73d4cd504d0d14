"""From the drafter's probability to the chance of being accepted: a map learned from verdicts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from foretell.core.feedback import Verdict
from foretell.core.tree import TokenTree

EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)


class Calibration:
    """P(a child is accepted | its elder siblings were refused), by rank and by h, the child's share
    of the probability that the elder ones left over.

    Drafters are wrong about this in ways that differ: the most probable token is right more often
    than its q says when the target is greedy, and a token drawn from q is accepted with much the
    same chance whatever its own q is. Counts in bins of (rank 0, 1, 2.., h) lean on a prior that
    was fitted to the bundled pair with the weight of some observations; old ones fade.
    """

    WEIGHT = 6.0
    KEEP = 0.99

    def __init__(self, sampled: bool) -> None:
        """sampled: whether drafts are draws from q (they are accepted by p / q then)."""
        self.sampled = sampled
        self.won = [[0.0] * (len(EDGES) + 1) for _ in range(3)]
        self.tried = [[0.0] * (len(EDGES) + 1) for _ in range(3)]
        self.rank_won, self.rank_tried = [0.0] * 3, [0.0] * 3

    def chance(self, rank: int, h: float) -> float:
        """Of the child of that rank with that share."""
        rank, h = min(rank, 2), min(max(h, 0.0), 1.0)
        if self.sampled:
            prior = 0.2 + 0.2 * h if rank else 0.55 + 0.35 * h
        else:
            prior = h**0.6 if rank else h**0.5
        b = bisect_right(EDGES, h)
        w = self.WEIGHT
        return (self.won[rank][b] + w * prior) / (self.tried[rank][b] + w)

    def mean(self, rank: int) -> float:
        """Of a child of that rank that is not drawn yet."""
        rank = min(rank, 2)
        prior = (0.6, 0.22, 0.16)[rank]
        w = self.WEIGHT
        return (self.rank_won[rank] + w * prior) / (self.rank_tried[rank] + w)

    def observe(self, tree: TokenTree, verdict: Verdict, shares: Sequence[float]) -> None:
        """shares: h of every drafted node of the tree."""
        for level in range(verdict.checked):
            children = tree.children(verdict.path[level - 1] if level else tree.tip)
            hit = verdict.path[level] if level < len(verdict.path) else -1
            for j, child in enumerate(children):
                rank, b = min(j, 2), bisect_right(EDGES, shares[child - tree.n_context])
                won = float(child == hit)
                for wins, tries, i in (
                    (self.won[rank], self.tried[rank], b),
                    (self.rank_won, self.rank_tried, rank),
                ):
                    wins[i] = self.KEEP * wins[i] + won
                    tries[i] = self.KEEP * tries[i] + 1
                if won:
                    break
