"""T(n): what a forward of n rows costs, through the `TargetModel` protocol alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from foretell.core.protocols import TargetModel
from foretell.engine.curve import ForwardTimer


def forward_curve(
    model: TargetModel, rows: Sequence[int] = (1, 2, 4, 8, 16), context: int = 256, repeats: int = 7
) -> dict[str, Any]:
    """Median milliseconds of one forward of n rows (logits of all of them) behind `context`
    committed rows of one sequence, and the ratio to one row. Row counts take turns.

    A model with a shorter context gets what it holds.
    """
    context = max(0, min(context, model.spec.max_positions - max(rows) - 1))
    timer = ForwardTimer(model, context)
    taken: dict[int, list[float]] = {n: [] for n in rows}
    for n in rows:
        timer(n)  # buffers, page faults
    for _ in range(repeats):
        for n in rows:
            taken[n].append(timer(n) * 1e3)
    medians = [statistics.median(taken[n]) for n in rows]
    return {
        "context": context,
        "rows": list(rows),
        "ms": [round(m, 4) for m in medians],
        "ratio": [round(m / medians[0], 4) for m in medians],
    }


def bandwidth(megabytes: int = 256, tries: int = 5) -> float:
    """Bytes a second that torch's threads read from a block no cache holds; the best of `tries`."""
    block = torch.ones(megabytes << 18, dtype=torch.float32)
    seconds = []
    for _ in range(tries + 1):
        start = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start)
    return block.numel() * 4 / min(seconds[1:])
