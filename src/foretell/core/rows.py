"""The largest entries of rows [n, V]. torch's argmax and topk visit a row element by element on a
CPU; at a vocabulary of 32,000 that is 50 to 70 microseconds a row, more than the rest of a step's
bookkeeping. numpy's argmax takes 3, `topk_rows` about 35 for one row and 13 for each of many, and
with a model's kernels 12 and 3.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

TopK = Callable[..., "tuple[np.ndarray, np.ndarray] | None"]  # `core.protocols.Ranks.topk`


def argmax_rows(rows: Tensor) -> list[int]:
    """The column of the largest entry of each row [n, V]; ties go to the lowest column, as with
    torch, and a NaN is larger than anything."""
    if rows.device.type != "cpu":
        return rows.argmax(-1).tolist()
    return rows.numpy().argmax(-1).tolist()


def peak(row: Tensor) -> tuple[int, float]:
    """The column of the largest entry of a row [1, V] of finite logits, and its softmax."""
    if row.device.type != "cpu":
        value, column = row.float().softmax(-1).max(-1)
        return int(column), float(value)
    x = row.numpy()[0]
    best = int(x.argmax())
    return best, 1.0 / float(np.exp(x - x[best]).sum())


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk_rows`, or `argmax_rows` and what it found, as tensors beside `rows`: (values, columns)
    [n, m] each."""
    if rows.device.type != "cpu":
        values, columns = rows.topk(min(k, rows.shape[-1]), dim=-1)
        return values, columns
    import torch

    best = rows.numpy().argmax(-1)[:, None] if k == 1 else topk_rows(rows, k)[1]
    found = torch.from_numpy(best)
    return rows.gather(-1, found), found


def topk_rows(
    rows: Tensor, k: int, at: np.ndarray | None = None, quick: TopK | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(values [n, m], columns [n, m] int64) of the m = min(k, V) largest entries of rows [n, V], in
    falling order; on a CPU the lower column comes first among equals (a GPU's topk leaves that
    open), and a NaN is smaller than anything. at [n]: the rows meant, of more; None = all. quick: a
    model's own way to the same on a CPU, asked first.

    A row is folded into lanes of columns that are equal modulo their number. The k-th largest of
    the lanes' maxima is a bound that at least k entries reach and, but for ties, few more, all of
    them in the lanes whose maximum reaches it.
    """
    k = min(k, rows.shape[-1])
    if rows.device.type != "cpu":
        values, columns = (rows if at is None else rows[at.tolist()]).topk(k, dim=-1)
        return values.float().cpu().numpy(), columns.cpu().numpy()
    x = rows.numpy()
    v = x.shape[1]
    n = len(x) if at is None else len(at)
    if not n or not k:
        return np.empty((n, k), x.dtype), np.empty((n, k), np.int64)
    if quick is not None and (found := quick(rows, k, at)) is not None:
        return found
    at = np.arange(n) if at is None else at
    lanes = 2 << round(np.log2(v * k) / 2)  # few lanes to rank, few columns in each
    lanes = lanes if 4 * k <= lanes <= v // 4 else v
    row, column = _reaching(x, at, k, lanes)
    if np.bincount(row, minlength=n).min() < k:  # a NaN hides what is in its lane
        row, column = np.divmod(np.arange(n * v), v)
    order = np.lexsort((column, -x[at[row], column], row))
    first = np.searchsorted(row[order], np.arange(n))
    found = column[order[first[:, None] + np.arange(k)]]
    return x[at[:, None], found], found


def _reaching(x: np.ndarray, at: np.ndarray, k: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices into `at`, columns) of the entries of x[at] that reach the k-th largest maximum of
    their row's lanes. The columns behind the last whole line of lanes are in no lane, but looked at
    all the same."""
    v = x.shape[1]
    whole = v // lanes * lanes
    if np.array_equal(at, np.arange(len(x))):
        top = x[:, :whole].reshape(len(x), -1, lanes).max(1)
    else:
        top = np.stack([x[r, :whole].reshape(-1, lanes).max(0) for r in at.tolist()])
    bound = np.partition(top, lanes - k, axis=1)[:, lanes - k]
    row, lane = np.divmod(np.flatnonzero(top >= bound[:, None]), lanes)
    if lanes == v:
        return row, lane
    column = (lane[:, None] + np.arange(0, whole, lanes)).ravel()
    row = np.repeat(row, whole // lanes)
    good = np.flatnonzero(x.ravel().take(at[row] * v + column) >= bound[row])
    rest_row, rest = np.divmod(np.flatnonzero(x[at, whole:] >= bound[:, None]), max(1, v - whole))
    return np.concatenate([row[good], rest_row]), np.concatenate([column[good], rest + whole])
