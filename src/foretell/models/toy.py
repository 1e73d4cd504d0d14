"""A tiny model for tests of distributions: small enough to enumerate, real in every other way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foretell.core.batch import PackedBatch, Segment
from foretell.models.native.arch import Arch
from foretell.models.native.families import LLAMA_NAMES
from foretell.models.native.runner import NativeModel
from foretell.models.native.weights import RandomSource


class ToyModel(NativeModel):
    """Two attention layers of random float64 weights over a vocabulary of about ten ids.

    The real runner, cache and transactions; the next-token distribution depends on the whole
    prefix and is far from flat. `sharpness` scales the logits.
    """

    def __init__(self, vocab: int = 11, seed: int = 0, sharpness: float = 2.0) -> None:
        arch = Arch.llama(vocab, 16, 2, 4, 2, 24, max_positions=512, theta=100.0, tied=False)
        source = RandomSource(seed, sharpness, torch.float64)
        super().__init__(arch, LLAMA_NAMES, source, torch.float64, name="toy")

    def next_probs(self, prefix: Sequence[int]) -> Tensor:
        """[V] float64: the distribution of the token after `prefix` (at least one id), computed
        from nothing."""
        n = len(prefix)
        rows = Segment(np.asarray(prefix, np.int64), np.arange(n), None, np.array([n - 1]))
        with self.open([self.new_cache(n)]) as txn:
            logits = self.forward(PackedBatch([rows]), txn).logits[0]
        return logits.double().softmax(-1)
