"""Muon: momentum whose matrix is replaced by its nearest orthogonal one before the step.

Paper: Muon is Scalable for LLM Training (Liu et al. 2025). Same rule as `torch.optim.Muon`, with
two differences that matter for small models: matrices of equal shape are orthogonalised together
in one batched product, and in float32 where the device has no bfloat16 arithmetic (a CPU without
AMX multiplies bfloat16 about four times slower than float32).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose fixed points push singular values to ~1


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards U V^T of each matrix; `[N, rows, columns]` in and out."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that AdamW's learning rates carry over."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            momentum = group["momentum"]
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                updates = []
                for weight in weights:
                    gradient, state = weight.grad, self.state[weight]
                    assert gradient is not None, "weights without one were left out above"
                    if not state:
                        state["momentum"] = torch.zeros_like(weight)
                    buffer = state["momentum"].lerp_(gradient, 1 - momentum)
                    updates.append(gradient.lerp(buffer, momentum))
                # An orthogonal matrix has entries of RMS 1/sqrt(larger side); AdamW's are ~0.2.
                scale = 0.2 * max(shape) ** 0.5
                orthogonal = orthogonalise(torch.stack(updates))
                for weight, update in zip(weights, orthogonal, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-group["lr"] * scale)
