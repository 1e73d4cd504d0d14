"""Greedy draft sampling: the most probable tokens and one draw, verified optimally."""

from __future__ import annotations

from torch import Tensor

from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import Kind, TokenTree
from foretell.verify.walk import Step, descend, refuse_in_turn, row_of


class GreedyDraft:
    """k children: the k - 1 most probable tokens S of q, and one token x drawn from q without S.

    x is accepted with probability min(1, p[x] / q'[x]), q' being q off S, renormalised. On refusal
    a token y is drawn from the normalised positive part of p - q'. Where y lies in S, that child
    stands and the walk goes on below it; where not, y is emitted and the walk ends. The acceptance
    p(S) + sum over the rest of min(p, q') is the most that any rule can reach with such children,
    at the price of one residual a node, however many children there are.

    Only drawn children are tested; all one-hot ones share the draw of y, so trees of any other
    encoding keep the target's law too. Paper: Hu et al., "Towards Optimal Multi-draft Speculative
    Decoding" (2025). Promise: lossless.
    """

    name = "greedy-draft"
    promise = Promise.LOSSLESS
    paper = "Towards Optimal Multi-draft Speculative Decoding"
    summary = "k-1 most probable children and one drawn, with the best rule for them"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.TOP_ONE

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        def test(node: int, left: float, q: float, here: int, index: int) -> bool:
            return rng.flip(left, q, here, index)

        def step(full: Tensor, children: list[int], here: int) -> Step:
            drawn = [c for c in children if row_of(tree, c) >= 0]
            hit, rest = refuse_in_turn(tree, full, drawn, here, test)
            if hit >= 0:
                return hit, -1
            said = rng.pick(rest, here)
            for child in children:
                fixed = row_of(tree, child) < 0 and tree.kind[child] == Kind.CANDIDATE
                if fixed and tree.tokens[child] == said:
                    return child, -1
            return -1, said

        return descend(tree, p, position, step)
