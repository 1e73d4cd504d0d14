"""Products with quantised weights, by stock torch: W8A8 and W4A8 with exact integer sums.

The rows of x are quantised one by one (`quantise_rows`), multiplied as integers and scaled in
float32 by single operations. Nothing in a row's result depends on the other rows, the number of
threads or the library's blocking: integer sums have no rounding to reorder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foretell.models.quant.formats import QTensor, quantise_rows

IntProduct = Callable[[Tensor, Tensor], Tensor]

_int_mm: IntProduct = torch.ops.aten._int_mm.default  # int8 x int8 -> int32

STACK = 16  # rows that make an integer product of one group worth its call
ROWS = 64  # int4: rows whose sums stay in the cache from one group to the next
EXACT = 1024  # inputs whose products of two 8-bit integers sum up exactly in float32
COLUMNS = 512


class QWeight:
    """The weights of one product, x [T, in] -> [T, sum of outs]: one quantised matrix, or several
    of different formats side by side."""

    __slots__ = ("parts", "shape")

    def __init__(self, parts: list[QTensor]) -> None:
        self.parts = parts
        self.shape = (parts[0].shape[1], sum(p.shape[0] for p in parts))  # [in, out], as a Tensor's

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


class IntegerProducts:
    """x @ w and acc += alpha * x @ w for QWeights."""

    def __init__(self, device: torch.device) -> None:
        self.dot: IntProduct = _int_mm if _int_mm_is_exact(device) else widened

    def mm(self, x: Tensor, w: QWeight) -> Tensor:
        """[T, in] float32 -> [T, out] float32."""
        if not len(x):
            return x.new_empty(0, w.shape[1])
        q, scale = quantise_rows(x)
        outs = [(self._four if p.group else self._eight)(q, scale, p) for p in w.parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def addmm_(self, acc: Tensor, x: Tensor, w: QWeight, alpha: float) -> Tensor:
        y = self.mm(x, w)
        return acc.add_(y if alpha == 1.0 else y.mul_(alpha))

    def _eight(self, q: Tensor, scale: Tensor, w: QTensor) -> Tensor:
        return torch.mul(scale[:, None], w.scale).mul_(self.dot(q, w.q.t()))

    def _four(self, q: Tensor, scale: Tensor, w: QTensor) -> Tensor:
        """Group after group in ascending order. For few rows several groups go into one integer
        product, each in rows of its own that are zero elsewhere."""
        if len(q) > ROWS:
            return torch.cat(
                [
                    self._four(*part, w)
                    for part in zip(q.split(ROWS), scale.split(ROWS), strict=True)
                ]
            )
        t, size, groups = len(q), w.group, w.scale.shape[1]
        out = torch.zeros(t, w.shape[0], dtype=torch.float32, device=q.device)
        many = max(1, STACK // t)
        by_group = w.scale.t()  # [groups, out]
        for a in range(0, groups, many):
            n = min(many, groups - a)
            x = q[:, a * size : (a + n) * size]
            if n > 1:
                apart = x.new_zeros(n, t, n, size)
                apart.diagonal(dim1=0, dim2=2).copy_(x.view(t, n, size).transpose(1, 2))
                x = apart.view(n * t, n * size)
            dots = self.dot(x, w.q[:, a * size : (a + n) * size].t()).view(n, t, -1)
            for part in torch.mul(dots, by_group[a : a + n, None]):
                out.add_(part)
        return out.mul_(scale[:, None])


def widened(x: Tensor, w: Tensor) -> Tensor:
    """int8 [T, K] @ int8 [K, N], exactly, by float32 products short enough to have no rounding."""
    k, n = w.shape
    out = torch.zeros(len(x), n, dtype=torch.float64, device=x.device)
    wide = x.float()
    for c in range(0, n, COLUMNS):
        for a in range(0, k, EXACT):
            block = w[a : a + EXACT, c : c + COLUMNS].float()
            out[:, c : c + COLUMNS] += wide[:, a : a + EXACT] @ block
    return out.float()


def _int_mm_is_exact(device: torch.device) -> bool:
    """Whether torch's own integer product can be used here: some devices refuse few rows, and a
    processor that sums pairs in 16 bits could saturate."""
    g = torch.Generator().manual_seed(0)
    w = 254 * torch.randint(0, 2, (72, 192), generator=g) - 127  # the extremes only
    w[0], w[1] = 127, -128
    small = w.to(device, torch.int8)
    for rows in (1, 2, 5, 16, 40):
        x = 254 * torch.randint(0, 2, (rows, 192), generator=g) - 127
        x[0] = 127
        for part in (slice(0, 192), slice(64, 128)):
            try:
                got = _int_mm(x[:, part].to(device, torch.int8), small[:, part].t())
            except RuntimeError:
                return False
            if not torch.equal(got.cpu().long(), x[:, part] @ w[:, part].t()):
                return False
    return True
