"""What length policies share: whose verdict is whose, and who learns from whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, SeqView
from foretell.core.tree import TokenTree

T = TypeVar("T")


def decided(
    views: Sequence[SeqView], trees: Sequence[TokenTree], verdicts: Sequence[Verdict]
) -> Iterator[tuple[SeqView, TokenTree, Verdict]]:
    """The sequences that were last given budgets, each with its tree and verdict.

    A step also holds sequences that were still reading their prompt; those emitted nothing.
    """
    pairs = [(t, v) for t, v in zip(trees, verdicts, strict=True) if v.tokens]
    if len(pairs) == len(views):
        for view, (tree, verdict) in zip(views, pairs, strict=True):
            yield view, tree, verdict


def learner(view: SeqView, shared: dict[Draw, T], make: Callable[[], T]) -> T:
    """Who learns for this sequence.

    Where drafts never change the output (greedy, replay) all sequences that are drawn alike learn
    together. Under rejection each learns alone, so that its seed means the same in any company.
    """
    if not view.draw.from_q:
        if view.draw not in shared:
            shared[view.draw] = make()
        return shared[view.draw]
    if view.effort is None:
        view.effort = make()
    return view.effort


def tried(tree: TokenTree, verdict: Verdict) -> Iterator[tuple[int, bool]]:
    """The drafted nodes that verification came to, in order, and whether each was accepted."""
    for level in range(verdict.checked):
        hit = verdict.path[level] if level < len(verdict.path) else -1
        for child in tree.children(verdict.path[level - 1] if level else tree.tip):
            yield child, child == hit
            if child == hit:
                break
