"""SpecTr's k-SEQ: one acceptance scale for all draws of a node."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import TokenTree
from foretell.verify.walk import Step, descend, q_row, refuse_in_turn, row_of, standing

ROUNDS = 26  # bisections: rho is exact to k * 2**-26


class SpecTr:
    """k-sequential selection: k independent draws x_1..x_k of a node are tried in turn with
    probability min(1, p[x] / (rho q[x])), the same for all of them.

    beta = sum over x of min(q, p / rho) is the chance of one draw; rho is the smallest number in
    [1, k] with 1 - (1 - beta)^k <= rho beta, which keeps the residual p - min(q, p / rho) *
    (1 - (1 - beta)^k) / beta positive. Its acceptance is at least 1 - 1/e of the best rule's for
    independent draws. Drafts are K chains; k is the number of those that share the accepted prefix,
    and rho is computed anew at each node. Siblings that were not drawn independently from one q
    (one q row for several, different rows) are verified in turn, as `rejection` does.

    Paper: Sun et al., "SpecTr: Fast Speculative Decoding via Optimal Transport" (2023).
    Promise: lossless.
    """

    name = "spectr"
    promise = Promise.LOSSLESS
    paper = "SpecTr: Fast Speculative Decoding via Optimal Transport"
    summary = "k-SEQ: independent siblings share one acceptance scale"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.PATHS

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        def ratio(node: int, left: float, q: float, here: int, index: int) -> bool:
            return rng.flip(left, q, here, index)

        def step(full: Tensor, children: list[int], here: int) -> Step:
            drawn = [c for c in children if row_of(tree, c) >= 0]
            fixed = [c for c in children if row_of(tree, c) < 0]
            q = common_row(tree, drawn, full)
            if q is None:
                hit, rest = refuse_in_turn(tree, full, children, here, ratio)
                return (hit, -1) if hit >= 0 else (-1, rng.pick(rest, here))
            rho, rest = k_seq(full, q, len(drawn))
            for index, child in enumerate(drawn):
                x = int(tree.tokens[child])
                if rng.flip(float(full[x]), rho * float(q[x]), here, index):
                    return standing(tree, drawn, child), -1
            said = rng.pick(rest, here)
            for child in fixed:  # one-hot ones stand iff they are what is said anyway
                if tree.tokens[child] == said:
                    return standing(tree, fixed, child), -1
            return -1, said

        return descend(tree, p, position, step)


def common_row(tree: TokenTree, drawn: list[int], like: Tensor) -> Tensor | None:
    """The q [V] that all of `drawn` were independently drawn from; None if there is none."""
    rows = [row_of(tree, c) for c in drawn]
    if not rows or len(set(rows)) < len(rows):
        return None
    q = q_row(tree, rows[0], like)
    same = all(bool((q_row(tree, r, like) == q).all()) for r in rows[1:])
    return q if same else None


def k_seq(p: Tensor, q: Tensor, k: int) -> tuple[float, Tensor]:
    """(rho, the residual [V], not normalised) of k independent draws from q [V] for target p [V].

    A draw x is accepted with probability min(1, p[x] / (rho q[x])).
    """
    rho = smallest_scale(p, q, k)
    wide_p, wide_q = p.double(), q.double()
    shared = torch.minimum(wide_q, wide_p / rho)
    beta = min(1.0, float(shared.sum()))
    if not beta > 0:
        return rho, p.clone()
    rest = (wide_p - shared * ((1 - (1 - beta) ** k) / beta)).clamp_(min=0)
    # Nothing is left when every draw is accepted; rounding may still refuse one.
    return rho, (rest if rest.sum() > 0 else wide_p).to(p.dtype)


def smallest_scale(p: Tensor, q: Tensor, k: int) -> float:
    """The smallest rho in [1, k] with 1 - (1 - beta)^k <= rho beta, from above."""
    if k == 1:
        return 1.0
    # min(q, p / rho) is q where p >= k q, p / rho where p <= q; rho decides about the rest only.
    whole, scaled = p >= k * q, p <= q
    open_ = ~(whole | scaled)
    fixed = torch.stack([(q * whole).double().sum(), (p * scaled).double().sum()]).tolist()
    some_p, some_q = p[open_].double().cpu().numpy(), q[open_].double().cpu().numpy()
    low, high = 1.0, float(k)  # k is always enough
    for _ in range(ROUNDS):
        rho = (low + high) / 2
        beta = fixed[0] + fixed[1] / rho + float(np.minimum(some_q, some_p / rho).sum())
        enough = 1 - (1 - beta) ** k <= rho * beta
        low, high = (low, rho) if enough else (rho, high)
    return high
