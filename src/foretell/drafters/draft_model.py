"""A smaller model that drafts for a larger one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import (
    Budget,
    BuildContext,
    Draw,
    KVCache,
    Needs,
    Promise,
    SeqView,
    TargetModel,
    Txn,
)
from foretell.core.rng import Purpose
from foretell.core.tree import TokenTree

CHUNK = 512  # rows of one catch-up forward


@dataclass(slots=True)
class DraftState:
    """The drafter's own cache of one sequence: rows for `fed`, of which `sure` are known to be
    committed text and the rest may be drafts that were refused."""

    cache: KVCache
    fed: list[int] = field(default_factory=list)
    sure: int = 0

    def catch_up(self, tokens: list[int]) -> list[int]:
        """Forget rows of refused drafts; return the tokens still to be fed (at least one)."""
        k, limit = self.sure, min(len(self.fed), len(tokens) - 1)
        while k < limit and self.fed[k] == tokens[k]:
            k += 1
        self.cache.truncate(k)
        del self.fed[k:]
        self.sure = k
        return tokens[k:]


@dataclass(slots=True)
class Growing:
    """A draft under construction; node i's parent is an earlier node, or -1 for the tip."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # q of the token
    qrow: list[int] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)  # [V] each
    paths: list[list[int]] = field(default_factory=list)  # nodes from the tip down to i
    row: dict[int, int] = field(default_factory=dict)  # node -> row in the drafter's transaction

    def tree(self, view: SeqView) -> TokenTree:
        q = torch.stack(self.q) if self.q else None
        qrow = self.qrow if self.q else None
        return TokenTree.build(
            view.pending, self.tokens, self.parents, qrow=qrow, q=q, score=self.scores
        )


class DraftModel:
    """Any smaller checkpoint with the target's tokenizer drafts `tokens` levels.

    ``branching=1`` drafts a chain; ``branching=b`` a tree: every expanded node gets b children, and
    on each level the b most probable paths are expanded. Draws follow the verifier: the most
    probable tokens (greedy), the target's own noise of that position (replay), or draws from q
    without replacement, q rows handed over (rejection). The drafter keeps a KV cache of its own and
    catches up with whatever was committed, so it may sleep for any number of steps.

    Papers: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023);
    Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling" (2023).
    Promise: keeps that of the verifier.
    """

    name = "draft-model"
    promise = Promise.EXACT
    paper = "Fast Inference from Transformers via Speculative Decoding"
    summary = "a smaller model drafts a chain or a k-ary tree"
    needs = Needs(own_model=True)

    def __init__(self, model: TargetModel, vocab: int, tokens: int = 3, branching: int = 1) -> None:
        if tokens < 1 or branching < 1:
            raise InputError("draft-model needs tokens >= 1 and branching >= 1.")
        if branching > 1 and not model.spec.caps.tree:
            raise InputError(
                "This draft model cannot score trees: leave out draft-model:branching."
            )
        self.model, self.vocab = model, vocab
        self.tokens, self.branching = tokens, branching
        self.shapes = frozenset({"chain" if branching == 1 else "tree", "onehot", "q"})

    @classmethod
    def build(
        cls, context: BuildContext, path: str | None = None, tokens: int = 3, branching: int = 1
    ) -> DraftModel:
        """`path`: a checkpoint directory or hub id; by default the drafter beside the target."""
        path = path or context.default_draft
        if path is None:
            raise InputError(
                "draft-model needs a smaller checkpoint: --draft draft-model:path=DIR "
                "(only the bundled model brings a drafter of its own)."
            )
        assert context.load_model is not None, "an engine that creates draft-model can load models"
        return cls(context.load_model(path), context.target.spec.vocab, tokens, branching)

    def begin(self, view: SeqView) -> DraftState:
        return DraftState(self.model.new_cache())

    def end(self, state: DraftState) -> None:
        state.cache.truncate(0)

    def observe(self, states: Sequence[DraftState], feedback: Sequence[Feedback]) -> None:
        """The cache reads the committed tokens when it next proposes."""

    def propose(
        self, states: Sequence[DraftState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        room = [self.model.spec.max_positions - len(v.tokens) for v in views]
        budgets = [
            b.clamp(nodes=b.nodes, depth=min(self.tokens, r), branching=self.branching)
            for b, r in zip(budgets, room, strict=True)
        ]
        awake = [i for i, b in enumerate(budgets) if not b.none]
        growing = [Growing() for _ in views]
        if awake:
            chain = max(budgets[i].branching for i in awake) == 1
            grow = self._grow_chains if chain else self._grow_trees
            grow(
                [states[i] for i in awake],
                [views[i] for i in awake],
                [budgets[i] for i in awake],
                [growing[i] for i in awake],
            )
        return [g.tree(v) for g, v in zip(growing, views, strict=True)]

    def _grow_chains(
        self,
        states: list[DraftState],
        views: list[SeqView],
        budgets: list[Budget],
        growing: list[Growing],
    ) -> None:
        """Draft level by level; rows of drafted tokens stay in the cache in case they stand."""
        feeds = [self._skip_ahead(s, v) for s, v in zip(states, views, strict=True)]
        live = list(range(len(views)))
        while live:
            caches = [states[i].cache for i in live]
            with self.model.open(caches) as txn:
                logits = self._forward(
                    [_chain(c, f) for c, f in zip(caches, feeds, strict=True)], txn
                )
                txn.commit([range(len(f)) for f in feeds])
            going, nexts = [], []
            for j, (i, feed) in enumerate(zip(live, feeds, strict=True)):
                states[i].fed += feed
                last = len(growing[i].tokens) - 1
                fresh = self._children(growing[i], last, logits[j], views[i], budgets[i], 1)
                if fresh and _goes_on(growing[i], fresh[0], budgets[i]):
                    going.append(i)
                    nexts.append([growing[i].tokens[-1]])
            live, feeds = going, nexts

    def _grow_trees(
        self,
        states: list[DraftState],
        views: list[SeqView],
        budgets: list[Budget],
        growing: list[Growing],
    ) -> None:
        """Draft level by level inside one transaction, which keeps only the committed text."""
        feeds = [self._skip_ahead(s, v) for s, v in zip(states, views, strict=True)]
        caches = [s.cache for s in states]
        frontier: list[list[int]] = [[-1] for _ in views]
        with self.model.open(caches) as txn:
            segments = [_chain(c, f) for c, f in zip(caches, feeds, strict=True)]
            while any(frontier):
                logits = self._forward(segments, txn)
                at = 0
                for i, nodes in enumerate(frontier):
                    fresh: list[int] = []
                    width = budgets[i].branching
                    for node in nodes:
                        fresh += self._children(
                            growing[i], node, logits[at], views[i], budgets[i], width
                        )
                        at += 1
                    fresh = [n for n in fresh if _goes_on(growing[i], n, budgets[i])]
                    fresh.sort(key=lambda n, g=growing[i]: -_path_score(g, n))
                    frontier[i] = sorted(fresh[:width])
                segments = [
                    _branches(g, nodes, len(v.tokens), len(f), used)
                    for g, nodes, v, f, used in zip(
                        growing, frontier, views, feeds, txn.scratch, strict=True
                    )
                ]
            txn.commit([range(len(f)) for f in feeds])
        for state, feed in zip(states, feeds, strict=True):
            state.fed += feed

    def _skip_ahead(self, state: DraftState, view: SeqView) -> list[int]:
        """Feed all but the last chunk of what the cache lacks; return that chunk."""
        feed = state.catch_up(view.tokens)
        while len(feed) > CHUNK:
            part, feed = feed[:CHUNK], feed[CHUNK:]
            with self.model.open([state.cache]) as txn:
                segment = _chain(state.cache, part)
                segment.logits = np.empty(0, np.int64)
                self.model.forward(PackedBatch([segment]), txn)
                txn.commit([range(len(part))])
            state.fed += part
        return feed

    def _forward(self, segments: list[Segment], txn: Txn) -> Tensor:
        """Logits [R, V] in the target's vocabulary (padding columns dropped or filled)."""
        logits = self.model.forward(PackedBatch(segments), txn).logits
        missing = self.vocab - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self.vocab] if missing else logits

    def _children(
        self, g: Growing, node: int, logits: Tensor, view: SeqView, budget: Budget, k: int
    ) -> list[int]:
        """Draw up to k children of `node` from its row [V]; returns the new nodes."""
        k = min(k, budget.nodes - len(g.tokens))
        if k <= 0:
            return []
        path = g.paths[node] if node >= 0 else []
        if view.draw is Draw.TOP and view.plain and k == 1 and budget.stop is None:
            ids, scores = [int(logits.argmax())], [1.0]
        else:
            q = view.warp(logits[None], [[g.tokens[n] for n in path]])[0]
            top = draw_order(q, view, len(path), node + 1, k)
            ids, scores = top.tolist(), q[top].tolist()
            keep = [i for i, s in enumerate(scores) if s > 0]  # q's support may be smaller than k
            ids, scores = [ids[i] for i in keep], [scores[i] for i in keep]
            if view.draw is Draw.SAMPLE:
                g.q.append(q)
        fresh = list(range(len(g.tokens), len(g.tokens) + len(ids)))
        g.tokens += ids
        g.scores += scores
        g.parents += [node] * len(ids)
        g.qrow += [len(g.q) - 1] * len(ids)
        g.paths += [[*path, n] for n in fresh]
        return fresh


def draw_order(q: Tensor, view: SeqView, level: int, order: int, k: int) -> Tensor:
    """The first k tokens that the sequence's way of drawing takes from q [V], in draw order.

    order: a number that no other node of the same draft shares.
    """
    base = len(view.tokens)
    if view.draw is Draw.NOISE:
        q = q / view.rng.race([base + level], Purpose.TARGET, len(q), q.device)[0]
    elif view.draw is Draw.SAMPLE:
        salt = (base << 16) + order
        q = q / view.rng.race([base + level], Purpose.DRAFT, len(q), q.device, salt)[0]
    return q.topk(min(k, len(q))).indices if k > 1 else q.argmax(-1, keepdim=True)


def _goes_on(g: Growing, node: int, budget: Budget) -> bool:
    """Whether to draft below `node` (which stays in the draft either way)."""
    path = g.paths[node]
    if len(path) >= budget.depth or len(g.tokens) >= budget.nodes:
        return False
    return budget.stop is None or not budget.stop([g.scores[n] for n in path])


def _path_score(g: Growing, node: int) -> float:
    return float(np.prod([g.scores[n] for n in g.paths[node]]))


def _chain(cache: KVCache, tokens: list[int]) -> Segment:
    """Rows for `tokens` behind what the cache holds; logits of the last."""
    n = len(tokens)
    positions = np.arange(cache.n, cache.n + n, dtype=np.int64)
    return Segment(np.asarray(tokens, np.int64), positions, None, np.array([n - 1]))


def _branches(g: Growing, nodes: list[int], base: int, context: int, used: int) -> Segment:
    """Rows for tree `nodes`; they see the `context` rows of this transaction and their ancestors.
    base: position of the tip's children; used: rows the transaction already holds."""
    n = len(nodes)
    ancestors = np.zeros((n, used + n), bool)
    ancestors[:, :context] = True
    for i, node in enumerate(nodes):
        g.row[node] = used + i
        ancestors[i, [g.row[a] for a in g.paths[node]]] = True
    tokens = np.asarray([g.tokens[x] for x in nodes], np.int64)
    positions = np.asarray([base + len(g.paths[x]) - 1 for x in nodes], np.int64)
    return Segment(tokens, positions, ancestors, np.arange(n))
