"""A token tree drawn from what `LogitNgrams` remember."""

from __future__ import annotations

import numpy as np
import torch

from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.rng import Purpose
from foretell.core.tree import TokenTree
from foretell.drafters.tables.logit_ngrams import LogitNgrams
from foretell.drafters.tables.ranks import RankTree


class GramTree:
    """One draft under construction. sampled: whether it is drawn from q, with q rows."""

    def __init__(self, view: SeqView, grams: LogitNgrams, sampled: bool) -> None:
        self.view, self.grams, self.sampled = view, grams, sampled
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.scores: list[float] = []
        self.qrow: list[int] = []
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []  # ids and q of each distribution

    def grow(self, shape: RankTree, budget: Budget) -> None:
        """Level by level; a node whose n-gram is unknown, or whose token the budget's rule stops
        at, has no children."""
        tail = self.view.tokens[-self.grams.max_n :]
        texts: dict[int, list[int]] = {-1: tail}  # node of the shape -> the text it ends
        trail: dict[int, list[float]] = {-1: []}
        index = {-1: -1}
        for level, (a, b) in enumerate(shape.bounds):
            wanted: dict[int, int] = {}  # parent -> children
            for parent in shape.parent[a:b].tolist():
                wanted[parent] = wanted.get(parent, 0) + 1
            found = [(p, self.grams.find(texts[p])) for p in wanted if p in texts]
            found = [(p, slot) for p, slot in found if slot >= 0]
            if not found:
                return
            drawn = self._draw(level, [slot for _, slot in found], [p + 1 for p, _ in found])
            first = dict(zip(wanted, np.cumsum([0, *wanted.values()]).tolist(), strict=False))
            for (parent, _), (ids, q, order) in zip(found, drawn, strict=True):
                if self.sampled:
                    self.rows.append((ids, q))
                for rank, j in enumerate(order[: wanted[parent]].tolist()):
                    if q[j] <= 0:
                        break
                    node, token = a + first[parent] + rank, int(ids[j])
                    index[node] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(index[parent])
                    self.scores.append(float(q[j]))
                    self.qrow.append(len(self.rows) - 1)
                    trail[node] = [*trail[parent], float(q[j])]
                    if budget.stop is None or not budget.stop(trail[node]):
                        texts[node] = [*texts[parent], token]

    def _draw(
        self, level: int, slots: list[int], orders: list[int]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For every slot: token ids [k], q [k], and the places in draw order [k]."""
        ids, q = self.grams.ids[slots], self.grams.probs[slots]
        view, base = self.view, len(self.view.tokens)
        if view.draw is not Draw.TOP:
            t = max(view.params.temperature, 1e-3)
            if t != 1:
                q = (q / q.max(1, keepdims=True)) ** np.float32(1 / t)
        q = q / q.sum(1, keepdims=True)
        weight = q
        if view.draw is Draw.NOISE:
            weight = q / view.rng.race_at([base + level] * len(slots), Purpose.TARGET, ids)
        elif self.sampled:
            salts = [(base << 16) + o for o in orders]
            weight = q / view.rng.race_at([base + level] * len(slots), Purpose.DRAFT, ids, salts)
        order = np.argsort(-weight, axis=1, kind="stable")
        return list(zip(ids, q, order, strict=True))

    def tree(self, vocab: int, device: torch.device) -> TokenTree:
        q = None
        if self.sampled and self.rows:
            q = torch.zeros(len(self.rows), vocab)
            ids = torch.from_numpy(np.stack([i for i, _ in self.rows]).astype(np.int64))
            q.scatter_add_(1, ids, torch.from_numpy(np.stack([p for _, p in self.rows])))
            q = q.to(device)
        return TokenTree.build(
            self.view.pending,
            self.tokens,
            self.parents,
            qrow=self.qrow if q is not None else None,
            q=q,
            score=self.scores,
        )
