"""How many levels each sequence drafts, given what levels bring and what steps take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

GIVE_UP = 3  # deepest levels that were no better than fewer


def together(
    gain: np.ndarray,
    rows: np.ndarray,
    forward: Callable[[np.ndarray], np.ndarray],
    draft: Callable[[Any, Any], Any],
) -> np.ndarray:
    """Expected tokens per second [K + 1] of B sequences that all draft 0, 1, .. K levels; arguments
    as in `allocate`. Levels that bring nothing are worth nothing."""
    count, most = gain.shape
    more = gain.sum(0)
    tokens = count + np.concatenate([[0.0], more.cumsum()])
    seconds = forward(count + np.concatenate([[0.0], rows.sum(0).cumsum()]))
    seconds[1:] += draft(np.arange(1, most + 1), count)
    tokens[1:][more < 1e-6] = 0.0
    return tokens / seconds


def allocate(
    gain: np.ndarray,
    rows: np.ndarray,
    forward: Callable[[np.ndarray], np.ndarray],
    draft: Callable[[Any, Any], Any],
) -> tuple[list[int], float]:
    """Levels of each of B > 1 sequences with the most expected tokens per second, and that rate.

    gain, rows [B, K]: emitted tokens and forward rows that each level adds on average;
    forward(rows [n]) -> seconds [n] of the step's target forward; draft(levels, sequences) ->
    seconds of drafting, where either is a number or an array. A level's tokens per row count as no
    better than those of the level above, so that what is admitted is always a number of levels.
    O(K B K) after one sort.
    """
    count, most = gain.shape
    best, rate = [0] * count, count / float(forward(np.array([float(count)]))[0])
    worth = np.minimum.accumulate(gain / np.maximum(rows, 1e-9), 1)
    worth[gain < 1e-6] = 0.0
    who, level = np.divmod(np.arange(count * most), most)
    order = np.lexsort((level, -worth.ravel()))
    order = order[worth.ravel()[order] > 0]
    found = 0
    for deep in range(1, most + 1):
        slots = order[level[order] < deep]
        if not len(slots) or level[slots].max() < deep - 1 or deep > found + GIVE_UP:
            break
        tokens = count + gain.ravel()[slots].cumsum()
        awake = (level[slots] == 0).cumsum()
        table = np.broadcast_to(draft(deep, np.arange(1, awake[-1] + 1)), awake[-1])
        seconds = forward(count + rows.ravel()[slots].cumsum()) + table[awake - 1]
        i = int((tokens / seconds).argmax())
        if tokens[i] / seconds[i] > rate:
            rate, found = float(tokens[i] / seconds[i]), deep
            best = np.bincount(who[slots[: i + 1]], minlength=count).tolist()
    return best, rate


def promise(
    levels: Sequence[int],
    gain: np.ndarray,
    rows: np.ndarray,
    forward: Callable[[np.ndarray], np.ndarray],
    draft: Callable[[Any, Any], Any],
) -> float:
    """Expected tokens per second of given levels, as in `allocate`."""
    chosen = np.arange(gain.shape[1]) < np.asarray(levels)[:, None]
    total = np.array([len(levels) + float(rows[chosen].sum())])
    seconds = float(forward(total)[0])
    if max(levels) > 0:
        seconds += draft(max(levels), sum(k > 0 for k in levels))
    return (len(levels) + float(gain[chosen].sum())) / float(seconds)


def other_way(
    levels: Sequence[int],
    idle: Sequence[int],
    gain: np.ndarray,
    rows: np.ndarray,
    forward: Callable[[np.ndarray], np.ndarray],
    draft: Callable[[Any, Any], Any],
    rate: float,
) -> tuple[int, float]:
    """The depth at which drafts of the `idle` sequences, which are given none, lose least, and the
    seconds that a step loses then: what it takes longer, less what the tokens that it is expected
    to bring are worth at `rate` tokens per second. Negative where it wins."""
    chosen = np.arange(gain.shape[1]) < np.asarray(levels)[:, None]
    base = len(levels) + float(rows[chosen].sum())
    awake, deep = sum(k > 0 for k in levels), max(levels)
    depths = np.arange(1, gain.shape[1] + 1)
    picked = list(idle)
    more = base + rows[picked].sum(0).cumsum()
    took = forward(np.concatenate([[base], more]))
    drafting = draft(np.maximum(depths, deep), awake + len(picked)) - (
        draft(deep, awake) if awake else 0.0
    )
    loss = took[1:] - took[0] + drafting - gain[picked].sum(0).cumsum() / rate
    i = int(loss.argmin())
    return i + 1, float(loss[i])
