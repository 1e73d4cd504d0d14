"""Cosines and sines of rotary positions as the fused forward reads them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foretell.models.native.arch import Rope


class Rotations:
    """Rows [2, dim / 2] float32 of one `Rope`: cosines, then sines, times its attention factor.

    Angles are float32 products, as Hugging Face computes them. The table grows on demand; where
    frequencies depend on the length of the text, rows are made for every forward.
    """

    def __init__(self, rope: Rope) -> None:
        self.rope = rope
        self.table = torch.empty(0, 2, rope.dim // 2)

    def at(self, positions: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """(table, [T] int64 row of each position) where frequencies vary. lengths: [T] the text
        length that decides those of each row."""
        regimes = np.array([self.rope.regime(int(n)) for n in lengths])
        table = torch.empty(len(positions), 2, self.rope.dim // 2)
        for regime in np.unique(regimes):
            rows = np.flatnonzero(regimes == regime)
            table[torch.from_numpy(rows)] = self._rows(positions[rows], int(regime))
        return table, np.arange(len(positions))

    def grow(self, longest: int) -> None:
        """Make `table`, where frequencies do not vary, reach position `longest`."""
        if longest >= len(self.table):
            self.table = self._rows(np.arange(max(longest + 1, 2 * len(self.table), 256)), 0)

    def _rows(self, positions: np.ndarray, regime: int) -> Tensor:
        angles = torch.from_numpy(positions).float()[:, None] * self.rope.frequencies(regime)
        turned = torch.polar(torch.full_like(angles, self.rope.attention), angles)
        return torch.stack([turned.real, turned.imag], 1).contiguous()
