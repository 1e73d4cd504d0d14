"""Self-speculation by skipping layers, the set of them being found on the fly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, SeqView, TargetModel
from foretell.core.rng import Purpose
from foretell.core.rows import argmax_rows
from foretell.core.tree import TokenTree
from foretell.drafters.layer_search import Search
from foretell.drafters.self_draft import (
    SelfDraft,
    check_threshold,
    run_some,
    shape_of,
    stop_below,
)
from foretell.drafters.trees.chain import Chain
from foretell.drafters.trees.drive import chain_segment
from foretell.drafters.trees.shape import TreeShape


def agreement(logits: Tensor, following: Sequence[int]) -> float:
    """Share of rows [n, V] whose argmax is the token that follows in the text."""
    return float(np.mean(np.asarray(argmax_rows(logits)) == np.asarray(following)))


@dataclass(slots=True)
class SkipState:
    shape: TreeShape
    search: Search
    view: SeqView
    steps: int = 0


class SelfSkip(SelfDraft):
    """Drafts with the target itself, leaving out a share `skip` of its inner layers (the first and
    the last always run): a chain of up to `tokens`, ended below a token whose probability is under
    `threshold`, or ``tree=NAME`` with that tree's options.

    Which layers to leave out is looked for while decoding: every `every` steps one random set, or
    every fifth time the one that a Gaussian process over the tries so far finds most promising, is
    scored by how often its argmax is the next token of the last `span` committed ones (one forward
    of the kept layers over a copy of the cache). The best set drafts; the search ends at a score of
    0.95 or after 60 tries without a better one. Each sequence searches for itself, by its own seed,
    so that its output is the same in any company. Keys and values are the target's.

    Paper: Xia et al., "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration"
    (2024). It skips attention and MLP apart; here a layer is left out whole. Draws follow the
    verifier: keeps its promise.
    """

    name = "self-skip"
    paper = "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration"
    summary = "the target without some of its layers drafts; which ones is found on the fly"

    def __init__(
        self,
        model: TargetModel,
        skip: float = 0.45,
        threshold: float = 0.8,
        every: int = 4,
        span: int = 32,
        shape: TreeShape | None = None,
    ) -> None:
        """every=0: keep to the first set."""
        super().__init__(model, shape or Chain(8))
        if not 0 < skip < 1 or every < 0 or span < 2:
            raise InputError("self-skip needs 0 < skip < 1, every >= 0 and span >= 2.")
        self.threshold, self.every, self.span = check_threshold(self.name, threshold), every, span
        self.choices = tuple(range(1, model.spec.layers - 1)) or (1,)
        self.skip = max(1, int(len(self.choices) * skip))

    @classmethod
    def build(
        cls,
        context: BuildContext,
        skip: float = 0.45,
        tokens: int = 8,
        threshold: float = 0.8,
        every: int = 4,
        span: int = 32,
        tree: str | None = None,
        **options: Any,
    ) -> SelfSkip:
        own = ("skip", "tokens", "threshold", "every", "span", "tree")
        shape = shape_of(cls.name, context, tokens, tree, options, own)
        return cls(context.target, skip, threshold, every, span, shape)

    def begin(self, view: SeqView) -> SkipState:
        seed = view.rng.key(0, Purpose.DRAFT)
        search = Search(self.choices, self.skip, random.Random(seed))
        return SkipState(self.shape.bind(view), search, view)

    def kept(self, skipped: Sequence[int]) -> tuple[int, ...]:
        return tuple(i for i in range(self.model.spec.layers) if i not in skipped)

    def propose(
        self, states: Sequence[SkipState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        limited = [stop_below(b, self.threshold) for b in budgets]
        runs = [self.kept(s.search.best) for s in states]
        return self.draft(states, views, limited, runs)

    def observe(self, states: Sequence[SkipState], feedback: Sequence[Feedback]) -> None:
        super().observe(states, feedback)
        for state, f in zip(states, feedback, strict=True):
            if not f.tokens or not self.every or state.search.done(0.95):
                continue
            state.steps += 1
            if state.steps % self.every == 0 and len(state.view.tokens) > self.span:
                layers = state.search.candidate()
                score = state.search.tried.get(layers)
                state.search.tell(
                    layers, self._score(state.view, layers) if score is None else score
                )

    def _score(self, view: SeqView, skipped: tuple[int, ...]) -> float:
        """How often the target without these layers says what the text says, on its tail."""
        assert view.cache is not None
        tokens, at = view.tokens, min(len(view.tokens) - 1 - self.span, view.cached)
        cache = self.model.new_cache(len(tokens))
        cache.copy_prefix(view.cache, max(0, at))
        segment = chain_segment(tokens[cache.n : -1], cache.n)
        segment.logits = None
        with self.model.open([cache]) as txn:
            logits = run_some(self.model, [segment], txn, self.kept(skipped))
        return agreement(logits, tokens[cache.n + 1 :])
