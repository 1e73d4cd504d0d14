"""Which tokens a draft takes from its distributions, and in which order.

The law of the output rests on these few lines: what is drawn must really be drawn from q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.core.protocols import Draw, SeqView
from foretell.core.rng import Purpose
from foretell.core.rows import largest


def ranked(
    q: Tensor, view: SeqView, how: Draw, levels: Sequence[int], orders: Sequence[int], width: int
) -> tuple[Tensor, Tensor]:
    """The first `width` tokens of each row in draw order, and the keys they were ranked by.

    q [k, V]: the distributions after k nodes; levels: drafted tokens above each; orders: a number
    that no other node of the same draft shares. Returns ids [k, w] int64 and keys [k, w], with
    w = min(width, V); tokens of probability 0 have key 0 and come last. Keys are, for
    TOP q; for NOISE q over the target's noise of that position, as shares of their sum over the row
    (the target will pick the largest p / E with that very noise); for SAMPLE q over noise of the
    drafter's own, a draw without replacement: 1 / key is when a clock of rate q first rings.
    """
    if how is Draw.NOISE:
        q = q / _targets_noise(q, view, levels)
        q = q / q.sum(-1, keepdim=True)
    elif how is Draw.SAMPLE:
        q = q / _own_noise(q, view, levels, orders)
    keys, ids = largest(q, width)
    return ids, keys


def _targets_noise(q: Tensor, view: SeqView, levels: Sequence[int]) -> Tensor:
    """[k, V], or [1, V] where all rows are of one position."""
    base = len(view.tokens)
    shared = len(set(levels)) == 1
    positions = [base + n for n in (levels[:1] if shared else levels)]
    return view.rng.race(positions, Purpose.TARGET, q.shape[-1], q.device)


def _own_noise(q: Tensor, view: SeqView, levels: Sequence[int], orders: Sequence[int]) -> Tensor:
    """[k, V]. The salt names round and node: no decision of an earlier round has seen it."""
    base, vocab = len(view.tokens), q.shape[-1]
    rows = [
        view.rng.race([base + n], Purpose.DRAFT, vocab, q.device, (base << 16) + order)
        for n, order in zip(levels, orders, strict=True)
    ]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def independent(
    q: Tensor, view: SeqView, levels: Sequence[int], orders: Sequence[int], width: int
) -> Tensor:
    """`width` independent draws from each row of q [k, V], repeats included: ids [k, width]."""
    base = len(view.tokens)
    points = [
        [view.rng.uniform(base + n, Purpose.DRAFT, i, (base << 16) + order) for i in range(width)]
        for n, order in zip(levels, orders, strict=True)
    ]
    sums = q.double().cumsum(-1)
    at = torch.tensor(points, dtype=torch.float64, device=q.device) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True).clamp_(max=q.shape[-1] - 1)


def without_top(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of each row [n, k], and the rows without them, normalised [n, V]
    (all zero where nothing is left)."""
    best = largest(q, k)[1]
    rest = q.scatter(-1, best, 0.0)
    return best, rest / rest.sum(-1, keepdim=True).clamp(min=1e-30)
