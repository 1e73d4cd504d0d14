"""Adaptive draft-verification: a tri-gram table that follows the text, searched by Monte-Carlo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, Needs, Promise, SeqView
from foretell.drafters.tables.sharing import check_share, shares
from foretell.drafters.tables.sketch import NOTHING, Sketch, Sketches, sketched
from foretell.drafters.tables.trigrams import Successors, TriGrams, mixed, monte_carlo


@dataclass(slots=True)
class AdedState:
    """One sequence: its own tri-grams over tokens[:known], and the tables it draws from."""

    view: SeqView
    shared: bool
    own: TriGrams
    successors: Successors
    known: int = 0


class Aded(Sketches):
    """Drafts a tree from what followed the last two tokens, two by two, by Monte-Carlo search.

    Three tables add up: the request's own text, the outputs of past requests, and a `corpus` (a
    text file that warms the drafter up). A tri-gram counts 1 where it occurs in the request and
    `past` elsewhere. The search spends `iterations` descents on balancing what has paid so far
    against what has hardly been tried, `depth` tokens deep; the most visited nodes, at most
    `nodes`, are the draft (see `tables.trigrams.monte_carlo`). All shared tables together stay
    within `bytes`. share: see `tables.sharing`. Deterministic one-hot drafts: keeps the promise of
    the verifier. Unlike the published code, a tri-gram counts once, when it is committed, and what
    was refused is never accepted by chance (its sampling rule is lossy).

    Paper: Liu et al., "Adaptive Draft-Verification for Efficient Large Language Model Decoding"
    (2024).
    """

    name = "aded"
    promise = Promise.EXACT
    reads_text = True
    paper = "Adaptive Draft-Verification for Efficient Large Language Model Decoding"
    summary = "tri-grams learnt on the way, searched by Monte-Carlo tree search"
    needs = Needs()
    shapes = frozenset({"tree", "onehot"})
    from_context = ("corpus",)

    def __init__(
        self,
        nodes: int = 16,
        depth: int = 6,
        iterations: int = 48,
        width: int = 12,
        past: float = 0.25,
        bytes: int = 32 << 20,
        share: str = "exact",
        corpus: Sequence[int] = (),
    ) -> None:
        """corpus: token ids."""
        if min(nodes, depth, iterations, width) < 1:
            raise InputError("aded needs nodes, depth, iterations and width of at least 1.")
        if past < 0 or bytes < 1 << 16:
            raise InputError("aded needs past >= 0 and bytes >= 65536.")
        self.nodes, self.depth, self.iterations = nodes, depth, iterations
        self.width, self.weight, self.share = width, past, check_share(self.name, share)
        self.corpus = TriGrams(bytes // 2, width)
        self.corpus.add(corpus, past)
        self.past = TriGrams(bytes - self.corpus.nbytes, width)

    @classmethod
    def build(cls, context: BuildContext, corpus: str | None = None, **options: Any) -> Aded:
        """corpus: path of a UTF-8 text file in the target's language."""
        return cls(corpus=[] if corpus is None else _read(corpus, context), **options)

    def state_bytes(self) -> int:
        """Of what all requests share."""
        return self.corpus.nbytes + self.past.nbytes

    def begin(self, view: SeqView) -> AdedState:
        own, shared = TriGrams(width=self.width), shares(view, self.share)
        tables = [t for t in (own, self.past if shared else None, self.corpus) if t is not None]
        return AdedState(view, shared, own, mixed(tables, self.width))

    def end(self, state: AdedState) -> None:
        """The output becomes part of the past."""
        view = state.view
        if state.shared:
            self.past.add(view.tokens[max(0, view.prompt_len - 2) :], self.weight)

    def observe(self, states: Sequence[AdedState], feedback: Sequence[Feedback]) -> None:
        """The table reads the committed tokens when it next proposes."""

    def sketch(
        self, states: Sequence[AdedState], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[Sketch]:
        return [self._one(s, v, b) for s, v, b in zip(states, views, budgets, strict=True)]

    def _one(self, state: AdedState, view: SeqView, budget: Budget) -> Sketch:
        tokens = view.tokens
        if budget.none or len(tokens) < 2:
            return NOTHING
        state.own.add(tokens[max(0, state.known - 2) :])
        state.known = len(tokens)
        successors = state.successors
        if budget.branching < self.width:
            successors = _narrow(successors, budget.branching)
        draft = monte_carlo(
            successors,
            (tokens[-2], tokens[-1]),
            min(self.depth, budget.depth),
            min(self.nodes, budget.nodes),
            self.iterations,
        )
        if not draft:
            return NOTHING
        ids, parents, levels, scores = map(np.array, zip(*draft, strict=True))
        return sketched(ids, parents, levels, scores, stop=budget.stop)


def _narrow(successors: Successors, width: int) -> Successors:
    return lambda a, b: successors(a, b)[:width]


def _read(corpus: str, context: BuildContext) -> list[int]:
    if context.tokenizer is None:
        raise InputError("aded:corpus needs a model with a tokenizer.")
    try:
        text = Path(corpus).read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"aded:corpus={corpus} cannot be read ({e.strerror}).") from None
    except UnicodeDecodeError as e:
        raise InputError(f"aded:corpus={corpus} is not UTF-8 (byte {e.start}).") from None
    return context.tokenizer.encode(text, False)
