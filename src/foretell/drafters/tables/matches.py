"""How sure a copy is: the longer the match behind it, the likelier it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONGEST = 32  # tokens of a match that are counted


def goes_on(matched: Any) -> Any:
    """The chance that the token behind a match of so many (>= 0, a number or an array) is right,
    too: as if it had been right so often and wrong once. A rule of thumb in the right order; who
    needs chances counts what comes true of scores in a range."""
    return matched / (matched + 1)


def match_length(tokens: Sequence[int], end: int, sure: int) -> int:
    """How many tokens before `end` are the last ones of the text, `sure` of them known to be."""
    n, most = sure, min(end, LONGEST)
    while n < most and tokens[end - 1 - n] == tokens[-1 - n]:
        n += 1
    return n


def chain_scores(matched: int, n: int) -> list[float]:
    """`goes_on` of n tokens one behind the other: where one is right the match has grown by it."""
    return [goes_on(m) for m in range(matched, matched + n)]


def scores(
    matched: int, probs: Sequence[float], parents: Sequence[int], levels: Sequence[int]
) -> list[float]:
    """Of each node of a draft [n], given that its parent is right. probs: of whole paths, by how
    often they followed the match; parents: indices of earlier nodes, -1 = the tip; levels: 1 below
    the tip."""
    path = [*probs, 1.0]  # of the tip, whose index is -1
    return [
        goes_on(matched + level - 1) * p / path[above]
        for p, above, level in zip(probs, parents, levels, strict=True)
    ]
