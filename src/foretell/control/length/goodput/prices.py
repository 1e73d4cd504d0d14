"""What a drafted token must bring to be worth its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Prices(NamedTuple):
    """In tokens."""

    row: float = 0.0  # of the target's forward
    draft: Sequence[float] = ()  # to draft on behind 1, 2, .. levels


def prices(
    count: int,
    rows: np.ndarray,
    drafted: np.ndarray,
    forward: Callable[[np.ndarray], np.ndarray],
    drafting: np.ndarray,
    rate: float,
) -> Prices:
    """Of B = count sequences. rows, drafted [K]: what levels 1..K add, of all sequences; forward:
    as in `allocate`; drafting [K]: seconds of drafting 1, 2, .. levels; rate: tokens per second
    that the machine makes anyway. A level that nobody is expected to get to is paid by one."""
    total = count + float(rows.sum())
    near = np.array([total - 1.0, total + 1.0]) if total > count + 1 else count + np.arange(2.0)
    row = float(np.diff(forward(near))[0]) / (near[1] - near[0])
    draft = np.diff(drafting) / np.maximum(drafted[1:], 1.0)
    return Prices(row * rate, (draft * rate).tolist())
