"""Retrieval drafting: what followed the longest match in a datastore on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from foretell.core.errors import InputError
from foretell.core.feedback import Feedback
from foretell.core.protocols import Budget, BuildContext, Needs, Promise, SeqView
from foretell.core.tree import TokenTree
from foretell.drafters.tables.datastore.prefixes import heaviest_prefixes
from foretell.drafters.tables.datastore.reader import Datastore
from foretell.drafters.tables.matches import goes_on
from foretell.drafters.tables.sketch import NOTHING, Sketch, Sketches, sketched


class Retrieval(Sketches):
    """Looks the longest suffix of the text (`max_match` down to `min_match` tokens) up in a
    datastore that `foretell build-datastore` made, and drafts the tree of the most frequent
    continuations: up to `nodes` nodes, `depth` tokens deep, counted over at most `samples` places.

    The store is mapped, not loaded: it costs page cache, is shared by all processes, and never
    changes. Where nothing matches nothing is drafted. Deterministic one-hot drafts: keeps the
    promise of the verifier.

    Paper: He, Zhong, Cai, Lee, He, "REST: Retrieval-Based Speculative Decoding" (2023).
    """

    name = "retrieval"
    promise = Promise.EXACT
    reads_text = True
    paper = "REST: Retrieval-Based Speculative Decoding"
    summary = "what most often followed the longest match in a datastore of text"
    needs = Needs()
    shapes = frozenset({"tree", "onehot"})
    from_context = ("store",)

    def __init__(
        self,
        store: Datastore,
        nodes: int = 16,
        depth: int = 10,
        max_match: int = 16,
        min_match: int = 2,
        samples: int = 256,
    ) -> None:
        if min(nodes, depth, samples) < 1 or not 1 <= min_match <= max_match:
            raise InputError(
                "retrieval needs nodes, depth, samples >= 1 and 1 <= min_match <= max_match."
            )
        if max_match + depth > store.sorted:
            raise InputError(
                f"retrieval:max_match + depth is at most {store.sorted}, "
                "the length by which the datastore is sorted."
            )
        self.store, self.nodes, self.depth = store, nodes, depth
        self.max_match, self.min_match, self.samples = max_match, min_match, samples

    @classmethod
    def build(cls, context: BuildContext, path: str | None = None, **options: Any) -> Retrieval:
        """path: the datastore. Refuses one that another tokenizer made."""
        if path is None:
            raise InputError(
                "retrieval needs a datastore: --draft retrieval:path=FILE, "
                "made by foretell build-datastore."
            )
        store = Datastore(path)
        mine = getattr(context.tokenizer, "fingerprint", None)
        if mine is not None and store.header.get("tokenizer") != mine:
            raise InputError(
                f"The datastore {path} was made with another tokenizer: "
                "build one for this model with foretell build-datastore --model."
            )
        if store.vocab > context.target.spec.vocab:
            raise InputError(
                f"The datastore {path} has {store.vocab} token ids but the model only "
                f"{context.target.spec.vocab}: build one for this model."
            )
        return cls(store, **options)

    def state_bytes(self) -> int:
        """Nothing of its own: the store is mapped."""
        return 0

    def begin(self, view: SeqView) -> None:
        return None

    def end(self, state: None) -> None:
        """Nothing to free."""

    def observe(self, states: Sequence[None], feedback: Sequence[Feedback]) -> None:
        """The store never changes."""

    def sketch(
        self, states: Sequence[None], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[Sketch]:
        return [self._one(v, b) for v, b in zip(views, budgets, strict=True)]

    def after(self, state: None, view: SeqView, path: Sequence[int], budget: Budget) -> TokenTree:
        """What follows the text and `path`, which is not part of it (yet): a tree whose context
        ends with `path`."""
        tail = [*view.tokens[-self.max_match :], *path]
        later = replace(view, tokens=tail, cached=0)
        return self._one(later, budget).tree(later.pending)

    def _one(self, view: SeqView, budget: Budget) -> Sketch:
        if budget.none:
            return NOTHING
        tail = view.tokens[-self.max_match :]
        for i in range(len(tail) - 1, -1, -1):  # ids the store cannot know
            if tail[i] >= self.store.vocab:
                tail = tail[i + 1 :]
                break
        matched, found = self.store.matches(tail, self.max_match, self.min_match)
        if not found:
            return NOTHING
        depth, nodes = min(self.depth, budget.depth), min(self.nodes, budget.nodes)
        rows = self.store.continuations(found, matched, depth, self.samples)
        tokens, parents, levels, scores = heaviest_prefixes(
            rows, nodes, self.store.vocab, budget.branching, ordered=len(found) == 1
        )
        sure = scores * goes_on(matched + levels - 1)
        return sketched(tokens, parents, levels, sure, stop=budget.stop)
