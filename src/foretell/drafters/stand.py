"""Stochastic n-grams: they remember distributions, which drafts are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, Needs, Promise, SeqView
from foretell.core.rows import topk_rows
from foretell.core.tree import TokenTree
from foretell.drafters.tables.gram_tree import GramTree
from foretell.drafters.tables.logit_ngrams import LogitNgrams
from foretell.drafters.tables.ranks import RankStats, RankTree, best_paths, tree_of
from foretell.drafters.tables.sharing import check_share, shares

OWN = 4 << 20  # bytes of the table of a request that keeps to itself
REFIT = 64  # tokens between two looks at what tree is best
PRIOR = (0.6, 0.12, 0.06, 0.03, 0.02, 0.015, 0.01, 0.01)


@dataclass(slots=True)
class StandTables:
    """What requests learn: the distributions, and how often the r-th draw was the right one."""

    grams: LogitNgrams
    stats: RankStats
    tokens: int = 0  # seen since the beginning
    fitted: int = -1  # REFIT periods before the last look
    paths: tuple[tuple[int, ...], ...] = ()


@dataclass(slots=True)
class StandState:
    """One sequence."""

    view: SeqView
    tables: StandTables
    learnt: bool = False


class Stand:
    """n-grams of up to `max_ngram` tokens remember the `k` likeliest tokens the target gave after
    them, averaged over visits; the longest one that matches the path is the draft distribution q.

    Draws follow the verifier: the likeliest tokens (greedy); the target's own noise (replay); draws
    from q without replacement by Gumbel-top-k, q rows handed over (rejection). q is tempered like
    the target's. The tree has `nodes` nodes, the likeliest by how often the r-th draw stood so far;
    it never looks at what is drawn, which keeps sampling unbiased. Where the n-gram is unknown
    nothing is drafted; n-grams of the prompt stand in until the target has been there. Shared
    tables stay within `bytes`; share: see `tables.sharing`. onehot=true hands over no q rows (for
    rules that want other draws). Promise: keeps that of the verifier.

    Paper: Song et al., "Accelerated Test-Time Scaling with Model-Free Speculative Sampling" (2025).
    """

    name = "stand"
    promise = Promise.EXACT
    paper = "Accelerated Test-Time Scaling with Model-Free Speculative Sampling"
    summary = "n-grams that remember the target's distributions; draws without replacement"
    needs = Needs(logits=True)
    from_context = ("vocab", "device")

    def __init__(
        self,
        vocab: int,
        nodes: int = 16,
        depth: int = 8,
        k: int = 8,
        max_ngram: int = 3,
        min_ngram: int = 1,
        bytes: int = 64 << 20,
        share: str = "exact",
        onehot: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(nodes, depth, k) < 1 or not 1 <= min_ngram <= max_ngram:
            raise InputError("stand needs nodes, depth, k >= 1 and 1 <= min_ngram <= max_ngram.")
        if bytes < 1 << 16:
            raise InputError("stand:bytes is at least 65536.")
        self.vocab, self.nodes, self.depth, self.k = vocab, nodes, depth, min(k, vocab)
        self.max_ngram, self.min_ngram, self.bytes = max_ngram, min_ngram, bytes
        self.share, self.onehot = check_share(self.name, share), onehot
        self.device = torch.device(device)
        self.shapes = frozenset({"tree", "onehot"} | (set() if onehot else {"q"}))
        self.tables = self._tables(bytes)

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Stand:
        """For the context's target."""
        target = context.target
        return cls(target.spec.vocab, device=target.device, **options)

    def _tables(self, limit: int) -> StandTables:
        grams = LogitNgrams(self.vocab, self.k, self.min_ngram, self.max_ngram, limit)
        prior = (PRIOR + (PRIOR[-1],) * self.k)[: self.k]
        return StandTables(grams, RankStats(prior))

    def state_bytes(self) -> int:
        """Of what all requests share."""
        return self.tables.grams.nbytes

    def begin(self, view: SeqView) -> StandState:
        shared = shares(view, self.share)
        return StandState(view, self.tables if shared else self._tables(min(self.bytes, OWN)))

    def end(self, state: StandState) -> None:
        """What it learnt stays."""

    def propose(
        self, states: Sequence[StandState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        for state in states:
            self._read(state)
        return [self._one(s, v, b) for s, v, b in zip(states, views, budgets, strict=True)]

    def _read(self, state: StandState) -> None:
        """The prompt's n-grams, once; with nothing to draft for, nobody calls `propose`."""
        if not state.learnt:
            state.tables.grams.learn(state.view.tokens[: state.view.prompt_len])
            state.learnt = True

    def _one(self, state: StandState, view: SeqView, budget: Budget) -> TokenTree:
        if budget.none:
            return TokenTree.context(view.pending)
        shape = self._shape(state.tables, budget)
        sampled = view.draw.from_q and not self.onehot
        drawn = GramTree(view, state.tables.grams, sampled)
        drawn.grow(shape, budget)
        return drawn.tree(self.vocab, self.device)

    def _shape(self, tables: StandTables, budget: Budget) -> RankTree:
        """The best tree by the ranks seen so far, looked at anew every REFIT tokens."""
        if tables.fitted != tables.tokens // REFIT:
            tables.fitted = tables.tokens // REFIT
            p = tables.stats.chances().tolist()
            tables.paths = tuple(path for _, path in best_paths(p, self.nodes, self.depth))
        limits = (min(self.nodes, budget.nodes), budget.depth, budget.branching)
        fits = [s for s in tables.paths if len(s) <= limits[1] and max(s) < limits[2]]
        if limits[2] == 1:  # a chain may use all the nodes
            fits = [(0,) * n for n in range(1, min(self.depth, limits[1]) + 1)]
        return tree_of(tuple(fits[: limits[0]]))

    def observe(self, states: Sequence[StandState], feedback: Sequence[Feedback]) -> None:
        for state, f in zip(states, feedback, strict=True):
            if f.tokens:
                self._learn(state, f)

    def _learn(self, state: StandState, f: Feedback) -> None:
        self._read(state)
        tables, tree, view = state.tables, f.tree, state.view
        base = view.cached - len(f.verdict.path)  # what was committed before this step
        nodes = [tree.tip, *f.verdict.path][: len(f.tokens)]
        logits = f.logits[nodes]
        _, ids = topk_rows(logits, self.k)
        picked = logits.gather(1, torch.from_numpy(ids).to(logits.device))
        probs = (picked - logits.logsumexp(-1, keepdim=True)).exp().cpu().numpy()
        text = view.tokens[max(0, base - self.max_ngram) : base]
        for i, (node, token) in enumerate(zip(nodes, f.tokens, strict=True)):
            tables.grams.put(text, ids[i], probs[i])
            text = [*text[-self.max_ngram + 1 :], token] if self.max_ngram > 1 else [token]
            children = tree.children(node)
            if children:
                drawn = tree.tokens[children].tolist()
                rank = drawn.index(token) if token in drawn else len(drawn)
                tables.stats.saw(rank, len(drawn))
        tables.tokens += len(nodes)
