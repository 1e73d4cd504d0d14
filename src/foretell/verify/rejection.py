"""Rejection sampling over chains and trees: the classic lossless rule."""

from __future__ import annotations

from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import TokenTree
from foretell.verify.walk import residual_walk


class Rejection:
    """Token-level speculative sampling, recursive and without replacement over siblings.

    At a node with target distribution P, try its children in draw order. A child x drawn from
    row Q is accepted with probability min(1, P[x] / Q[x]); on refusal P becomes the normalised
    positive part of P - Q, and Q loses x (the next sibling was drawn without replacement). A
    one-hot child is accepted with probability P[x]; on refusal P loses x. After the last child a
    token is drawn from what is left of P. DEAD children are refused by P[x] = 0, with their Q.

    Papers: Leviathan et al. 2023 and Chen et al. 2023 (chains); Jeon et al., "Recursive
    Speculative Decoding: Accelerating LLM Inference via Sampling Without Replacement" (2024).
    Promise: lossless (the output has exactly the target's distribution).
    """

    name = "rejection"
    promise = Promise.LOSSLESS
    paper = (
        "Recursive Speculative Decoding: Accelerating LLM Inference "
        "via Sampling Without Replacement"
    )
    summary = "accept with probability min(1, p/q), siblings without replacement"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.SAMPLE

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        return residual_walk(tree, p, rng, position)
