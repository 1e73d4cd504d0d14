"""Token recycling: the target's own runners-up, kept in a table, are tomorrow's drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, CostModel, Needs, Promise, SeqView
from foretell.core.rows import TopK, topk_rows
from foretell.drafters.tables.adjacency import Adjacency
from foretell.drafters.tables.ranks import (
    PAPER,
    RankTree,
    best_paths,
    best_size,
    paper_tree,
    tree_of,
)
from foretell.drafters.tables.sharing import check_share, shares
from foretell.drafters.tables.sketch import NOTHING, Sketch, Sketches, sketched

REFIT = 64  # steps between two looks at what tree is best
DEPTH = 8  # levels of a sized tree


@dataclass(slots=True)
class Recycled:
    """One sequence: the table it reads, and whether its prompt has been entered."""

    table: Adjacency
    learnt: bool = False


class TokenRecycling(Sketches):
    """For every token of the vocabulary, the `k` tokens the target last thought likeliest after it.

    A tree of fixed shape is read off that table, level by level, from the last token; after the
    forward the rows of *all* nodes, refused ones too, are written back. The table is shared by all
    requests and has 4 k V bytes (1 MB for V = 32,000). Where a prompt is first seen, the pairs of
    its text go to the front of their rows.

    nodes: size of the tree. 80 is the published tree, a smaller number its likeliest part, 0 (the
    default) the size with the most tokens per second, from how often candidates of each rank have
    come true and what a forward of so many rows costs here; without a cost model the published
    tree. Requests under a rejection rule keep the size that was best first: a seed repeats.
    update: ``all`` nodes write their row (the paper) or only those on the accepted ``path``.
    share: see `tables.sharing`. Deterministic one-hot drafts: keeps the promise of the verifier.

    Paper: Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models
    with Token Recycling" (2024).
    """

    name = "token-recycling"
    promise = Promise.EXACT
    paper = (
        "Turning Trash into Treasure: Accelerating Inference of Large Language Models "
        "with Token Recycling"
    )
    summary = "a tree of what the target last thought likely after each token"
    needs = Needs(logits=True)
    shapes = frozenset({"tree", "onehot"})
    from_context = ("vocab", "cost", "topk")
    may_miss = True  # what a step teaches costs more than many a draft, and is not needed

    def __init__(
        self,
        vocab: int,
        nodes: int = 0,
        k: int = 8,
        update: str = "all",
        share: str = "exact",
        cost: CostModel | None = None,
        topk: TopK | None = None,
    ) -> None:
        """topk: the target's own, where it has one (`Ranks`)."""
        if nodes < 0 or not 1 <= k <= 64:
            raise InputError("token-recycling needs nodes >= 0 and 1 <= k <= 64.")
        if update not in ("all", "path"):
            raise InputError(f"token-recycling:update={update} is neither 'all' nor 'path'.")
        self.vocab, self.nodes, self.k, self.update = vocab, nodes, min(k, vocab), update
        self.share, self.cost, self.topk = check_share(self.name, share), cost, topk
        self.table = Adjacency(vocab, self.k)
        self.steps = 0
        self.first_size = 0  # for requests whose drafts must not depend on the clock
        self._fitted: dict[tuple[int, int, int, int], tuple[int, RankTree]] = {}

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> TokenRecycling:
        """Sized by the engine's cost model unless `nodes` says otherwise."""
        target = context.target
        topk = getattr(target, "topk", None)
        return cls(target.spec.vocab, cost=context.cost, topk=topk, **options)

    def state_bytes(self) -> int:
        """Of what all requests share."""
        return self.table.nbytes

    def begin(self, view: SeqView) -> Recycled:
        shared = shares(view, self.share)
        return Recycled(self.table if shared else Adjacency(self.vocab, self.k))

    def end(self, state: Recycled) -> None:
        """What it learnt stays."""

    def sketch(
        self, states: Sequence[Recycled], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[Sketch]:
        self.steps += 1
        for state, view in zip(states, views, strict=True):
            if not state.learnt:
                state.table.learn(view.tokens[: view.prompt_len])
                state.learnt = True
        return [
            NOTHING if b.none else self._one(s, v, b, len(views))
            for s, v, b in zip(states, views, budgets, strict=True)
        ]

    def _one(self, state: Recycled, view: SeqView, budget: Budget, sequences: int) -> Sketch:
        shape = self._shape(state.table, view, budget, sequences)
        if not len(shape):
            return NOTHING
        tokens, kept = state.table.expand(view.tokens[-1], shape)
        scores = None
        if budget.stop is not None:
            scores = state.table.stats.chances()[shape.rank]
        return sketched(tokens, shape.parent, shape.level, scores, kept, budget.stop)

    def _shape(self, table: Adjacency, view: SeqView, b: Budget, sequences: int) -> RankTree:
        sized = self.nodes == 0 and self.cost is not None
        if not sized:
            want = self.nodes or len(PAPER)
            p = tuple(table.stats.prior.tolist())
            return paper_tree(p, min(want, b.nodes), min(b.depth, DEPTH), b.branching)
        limit = min(b.nodes, len(PAPER))
        if table is not self.table:  # a tree that follows neither other requests nor the clock
            chosen = best_paths(table.stats.prior.tolist(), limit, min(b.depth, DEPTH), b.branching)
            if not self.first_size:
                self.first_size = max(1, self._best([c for c, _ in chosen], view, sequences))
            return tree_of(tuple(path for _, path in chosen[: self.first_size]))
        key = (limit, min(b.depth, DEPTH), min(b.branching, self.k), sequences)
        known = self._fitted.get(key)
        if known is None or self.steps - known[0] >= REFIT:
            chosen = best_paths(table.stats.chances().tolist(), *key[:3])
            size = self._best([c for c, _ in chosen], view, sequences)
            if len(self._fitted) > 256:
                self._fitted.clear()
            known = (self.steps, tree_of(tuple(path for _, path in chosen[:size])))
            self._fitted[key] = known
        return known[1]

    def _best(self, chances: list[float], view: SeqView, sequences: int) -> int:
        assert self.cost is not None
        return best_size(chances, self.cost, view.cached * sequences, sequences)

    def observe(self, states: Sequence[Recycled], feedback: Sequence[Feedback]) -> None:
        for state, f in zip(states, feedback, strict=True):
            if f.tokens:
                self._learn(state.table, f)

    def _learn(self, table: Adjacency, f: Feedback) -> None:
        tree, path = f.tree, [f.tree.tip, *f.verdict.path]
        tokens, depth = tree.tokens.tolist(), tree.depth.tolist()
        before = tokens[tree.tip]
        for token in f.tokens:
            table.stats.saw(table.rank(before, token))
            before = token
        # A token may stand at several nodes: refused ones first, the shallower over the deeper;
        # then the accepted ones, the later over the earlier. Only the last one's row is kept.
        kept: dict[int, int] = {}  # token -> its packed row
        rows = f.logits.row.tolist()
        if self.update == "all":
            refused = set(range(tree.tip, len(rows))).difference(path)
            for node in sorted(refused, key=lambda n: (-depth[n], n)):
                if rows[node] >= 0:
                    kept[tokens[node]] = rows[node]
        kept.update((tokens[node], rows[node]) for node in path)
        _, ids = topk_rows(f.logits.packed, self.k, np.array([*kept.values()]), self.topk)
        table.put(np.array([*kept]), ids)
