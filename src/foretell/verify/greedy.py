"""Greedy verification: emit the argmax sequence of plain decoding."""

from __future__ import annotations

from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import TokenTree
from foretell.verify.walk import argmaxes, follow


class Greedy:
    """Accepts a drafted token iff it is the target's argmax after processors (temperature 0).

    At temperature 0 every lossless rule is this walk, so the engine uses it there whatever rule is
    chosen for sampling. Ties go to the lowest id. Paper: Stern, Shazeer, Uszkoreit, "Blockwise
    Parallel Decoding for Deep Autoregressive Models" (2018). Promise: exact.
    """

    name = "greedy"
    promise = Promise.EXACT
    paper = "Blockwise Parallel Decoding for Deep Autoregressive Models"
    summary = "accept what equals the target's argmax (temperature 0)"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.TOP

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        return follow(tree, argmaxes(tree, p))
