"""Matrix products x [T, in] @ w [in, out] for weights laid out by layers.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
AddProduct = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def products(dtype: torch.dtype, device: torch.device) -> tuple[Product, AddProduct]:
    """(x @ w, acc += alpha * x @ w in place), the quickest way for a dtype on a device."""

    def addmm_(acc: Tensor, x: Tensor, w: Tensor, alpha: float) -> Tensor:
        return acc.addmm_(x, w, alpha=alpha)

    return torch.mm, addmm_
