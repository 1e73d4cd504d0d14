"""Matrix products x [T, in] @ w [in, out] for weights laid out by layers.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
AddProduct = Callable[[Tensor, Tensor, Tensor, float], Tensor]

COLUMNS = 8192
BLOCK = 160 * 1024  # numbers: as float32 a third of an L2 cache


def products(dtype: torch.dtype, device: torch.device) -> tuple[Product, AddProduct]:
    """(x @ w, acc += alpha * x @ w in place), the quickest way for a dtype on a device."""
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _native(dtype):
        return _widened, _add_widened
    return torch.mm, _add


def _native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies the dtype itself instead of having it emulated."""
    checks = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks[dtype])


def _add(acc: Tensor, x: Tensor, w: Tensor, alpha: float) -> Tensor:
    return acc.addmm_(x, w, alpha=alpha)


def _widened(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w) if len(x) == 1 else _blocks(x, w).to(x.dtype)


def _add_widened(acc: Tensor, x: Tensor, w: Tensor, alpha: float) -> Tensor:
    if len(x) == 1:
        return acc.addmm_(x, w, alpha=alpha)
    return acc.add_(_blocks(x, w), alpha=alpha)


def _blocks(x: Tensor, w: Tensor) -> Tensor:
    """x @ w in float32, w widened block by block in the cache. One row alone is bound by memory
    and quicker through the emulated product; from two rows on this is up to 2.5 times quicker."""
    inner, outer = w.shape
    x = x.float()
    out = x.new_zeros(len(x), outer)
    for c in range(0, outer, COLUMNS):
        part = out[:, c : c + COLUMNS]
        width = part.shape[1]
        rows = max(8, BLOCK // width)
        buffer = x.new_empty(min(rows, inner), width)
        for k in range(0, inner, rows):
            block = w[k : k + rows, c : c + width]
            wide = buffer[: len(block)].copy_(block)
            part.addmm_(x[:, k : k + rows], wide)
    return out
