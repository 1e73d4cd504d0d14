"""Effort policies, and the walk's treatment of dead nodes."""

from __future__ import annotations

import pytest

from foretell import InputError
from foretell.control.length.confidence import Confidence
from foretell.control.length.fixed import Fixed
from foretell.core.protocols import Load
from foretell.core.tree import Kind, TokenTree
from foretell.verify.walk import follow


def test_confidence_stops_below_a_doubtful_token_only() -> None:
    (budget,) = Confidence(threshold=0.5, tokens=4).budgets([None], Load())  # type: ignore[list-item]
    assert budget.depth == 4
    assert budget.stop is not None
    assert budget.stop([0.9, 0.49])
    assert not budget.stop([0.1, 0.5])


def test_a_threshold_outside_its_range_is_refused() -> None:
    with pytest.raises(InputError, match="outside"):
        Confidence(threshold=1.5)


def test_fixed_gives_everybody_the_same() -> None:
    budgets = Fixed(tokens=2, nodes=3).budgets([None, None], Load())  # type: ignore[list-item]
    assert [(b.depth, b.nodes, b.stop) for b in budgets] == [(2, 3, None)] * 2


def test_the_walk_never_steps_on_a_dead_node() -> None:
    """A dead node has no row, so even one that says the right token ends the walk."""
    tree = TokenTree.chain([1], [5, 6])
    tree.kind[1:] = Kind.DEAD
    verdict = follow(tree, [0], [5])
    assert (verdict.path, verdict.tokens) == ([], [5])
