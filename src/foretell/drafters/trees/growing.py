"""What all growers share: the nodes so far, drawing candidates, keeping them, the final tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.trees import draw


@dataclass(slots=True)
class Drawn:
    """The candidates below one node, in draw order; those of probability 0 are left out."""

    node: int
    ids: list[int]
    q: list[float]  # probability of each in the drafter's distribution
    keys: list[float]  # what they were ranked by (`draw.ranked`)
    rows: list[Tensor | None]  # [V] each: what it was drawn from, None = one-hot. Draws without
    # replacement share one row; independent ones have a row of their own (`core.protocols.Draw`).
    weight: list[float]  # estimates of the probability that the target says each
    entropy: float = 0.0  # of the drafter's distribution, in nats; 0 where nobody asks for it


class Growing:
    """A draft under construction (`shape.Grower`); node i is the i-th drafted token, -1 the tip.

    Subclasses say which rows they want (`frontier`) and what to keep of them (`expand`, with
    `drawn` and `add`). With `sampled=False` the most probable tokens are taken even where the
    verifier asks for draws from q, and no q rows are handed over: deterministic drafts are lossless
    under every rule. A shape that does draw from q may let anything decide whether a node exists
    except that node's own token and its q; nodes that are in the tree to stay may be looked at.
    """

    def __init__(self, view: SeqView, budget: Budget, sampled: bool = True) -> None:
        self.view, self.budget = view, budget
        self.how = view.draw if sampled or not view.draw.from_q else Draw.TOP
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.paths: list[list[int]] = []  # nodes from the tip's child down to each node
        self.scores: list[float] = []  # q of the token
        self.entropies: list[float] = []  # of the distribution it was taken from
        self.qrow: list[int] = []  # index into q, -1 = one-hot
        self.q: list[Tensor] = []  # [V] each
        self.dead: set[int] = set()  # repeats of an earlier sibling: nothing grows below them
        self._first: dict[int, int] = {}  # node -> its first child

    @property
    def room(self) -> int:
        """Nodes the budget still allows."""
        return self.budget.nodes - len(self.tokens)

    def ids(self, node: int) -> list[int]:
        """Token ids from the tip's child down to `node` ([] for the tip)."""
        return [self.tokens[n] for n in self.paths[node]] if node >= 0 else []

    def level(self, node: int) -> int:
        """0 at the tip, 1 for its children."""
        return len(self.paths[node]) if node >= 0 else 0

    def distributions(self, logits: Tensor, nodes: Sequence[int]) -> Tensor:
        """q [k, V] after each of `nodes`, from the raw logits [k, V]."""
        return self.view.warp(logits, [self.ids(n) for n in nodes])

    def drawn(self, logits: Tensor, nodes: Sequence[int], width: int) -> list[Drawn]:
        """Up to `width` candidates below each of `nodes`, from the raw logits [k, V] after them."""
        width = max(1, min(width, self.budget.branching))
        q = self.distributions(logits, nodes)
        at = [self.level(n) for n in nodes], [n + 1 for n in nodes]
        how = self.how if width > 1 or not self.how.from_q else Draw.SAMPLE
        rest = q
        if how in (Draw.IID, Draw.PATHS):
            ids = draw.independent(q, self.view, *at, width)
            keys = q.gather(-1, ids)
        elif how is Draw.TOP_ONE:
            best, rest = draw.without_top(q, width - 1)
            first, _ = draw.ranked(rest, self.view, Draw.SAMPLE, *at, 1)
            ids = torch.cat([first, best], -1)
            keys = torch.cat([rest.gather(-1, first), q.gather(-1, best)], -1)
        else:
            ids, keys = draw.ranked(q, self.view, how, *at, width)
        # one transfer for all of it; float64 holds every id
        both = torch.stack([ids.double(), q.gather(-1, ids).double(), keys.double()]).tolist()
        doubts = [0.0] * len(nodes)
        if self.budget.unsure is not None:
            doubts = torch.special.entr(q).sum(-1).tolist()
        result = []
        for i, node in enumerate(nodes):
            rows: list[Tensor | None]
            if how is Draw.SAMPLE:
                rows = [q[i]] * width
            elif how in (Draw.IID, Draw.PATHS):
                rows = [q[i].view(-1) for _ in range(width)]  # equal, but not the same
            elif how is Draw.TOP_ONE:
                rows = [rest[i], *[None] * (width - 1)]
            else:
                rows = [None] * width
            possible = [j for j, key in enumerate(both[2][i]) if key > 0]
            scores = [both[1][i][j] for j in possible]
            keyed = [both[2][i][j] for j in possible]
            result.append(
                Drawn(
                    node,
                    [int(both[0][i][j]) for j in possible],
                    scores,
                    keyed,
                    [rows[j] for j in possible],
                    keyed if how is Draw.NOISE else scores,
                    doubts[i],
                )
            )
        return result

    def add(self, below: Drawn, first: int, last: int) -> list[int]:
        """Keep candidates first..last-1 of `below`, as far as there are any and the budget allows;
        returns the new nodes. Candidates must be kept in their order, none left out."""
        node, above = below.node, self.paths[below.node] if below.node >= 0 else []
        fresh = []
        for j in range(first, min(last, len(below.ids), first + self.room)):
            n, row = len(self.tokens), below.rows[j]
            if row is None:
                self.qrow.append(-1)
            elif j > 0 and row is below.rows[0]:
                self.qrow.append(self.qrow[self._first[node]])
            else:
                self.qrow.append(len(self.q))
                self.q.append(row)
            if j == 0:
                self._first[node] = n
            if below.ids[j] in below.ids[:j]:
                self.dead.add(n)
            self.tokens.append(below.ids[j])
            self.parents.append(node)
            self.paths.append([*above, n])
            self.scores.append(below.q[j])
            self.entropies.append(below.entropy)
            fresh.append(n)
        return fresh

    def goes_on(self, node: int) -> bool:
        """Whether to draft below `node`, which stays in the draft either way."""
        path = self.paths[node]
        if len(path) >= self.budget.depth or self.room <= 0 or node in self.dead:
            return False
        stop, unsure = self.budget.stop, self.budget.unsure
        if stop is not None and stop([self.scores[n] for n in path]):
            return False
        return unsure is None or not unsure([self.entropies[n] for n in path])

    def tree(self) -> TokenTree:
        q = torch.stack(self.q) if self.q else None
        tree = TokenTree.build(
            self.view.pending,
            self.tokens,
            self.parents,
            qrow=self.qrow if self.q else None,
            q=q,
            score=self.scores,
        )
        if self.dead:
            tree.kind[[tree.n_context + n for n in sorted(self.dead)]] = Kind.DEAD
        return tree


class Levels(Growing):
    """Grows level by level: every expansion makes the next frontier."""

    def __init__(self, view: SeqView, budget: Budget, sampled: bool = True) -> None:
        super().__init__(view, budget, sampled)
        self.front: list[int] = [] if budget.none else [-1]

    def frontier(self) -> list[int]:
        return self.front
