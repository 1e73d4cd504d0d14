"""SpecInfer's multi-round rejection: siblings drawn independently."""

from __future__ import annotations

from foretell.core.protocols import Draw
from foretell.verify.rejection import Rejection


class SpecInfer(Rejection):
    """Rejection over siblings that were drawn from q with replacement.

    The walk is that of `rejection`; every sibling has a q row of its own, so q is the same in all
    rounds of a node. A repeated draw is always refused (P lost that token in the first refusal),
    and its refusal still turns P into the positive part of P - q.

    Paper: Miao et al., "SpecInfer: Accelerating Large Language Model Serving with Tree-based
    Speculative Inference and Verification" (2024). Promise: lossless.
    """

    name = "specinfer"
    paper = (
        "SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative "
        "Inference and Verification"
    )
    summary = "accept with probability min(1, p/q), siblings drawn independently"
    draw = Draw.IID
