"""Replay verification: sampled decoding whose output does not depend on what was drafted."""

from __future__ import annotations

import torch

from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.rng import Purpose
from foretell.core.tree import TokenTree
from foretell.verify.walk import follow


class Replay:
    """The token at absolute position t is ``argmax(p / E(seed, t))``, with exponential noise E that
    is keyed by seed and position alone (the Gumbel trick: ``argmax(log p + Gumbel)``). A drafted
    token is accepted iff it equals that token, so the output is, token for token, that of plain
    sampled decoding with the same seed. Drafters that know their q use the same noise to agree
    more often (Draw.NOISE). Cost: one noise row per depth of the tree.

    Paper: the sample-and-match rule of Leviathan, Kalman, Matias, "Fast Inference from
    Transformers via Speculative Decoding" (2023), under common random numbers. Promise: exact.
    """

    name = "replay"
    promise = Promise.EXACT
    paper = "Fast Inference from Transformers via Speculative Decoding"
    summary = "accept what equals the token that (seed, position) would draw anyway"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.NOISE

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        nodes = tree.decisions()
        return follow(tree, nodes, replay_tokens(tree, nodes, p.probs(nodes), rng, position))


def replay_tokens(
    tree: TokenTree, nodes: list[int], probs: torch.Tensor, rng: Draws, position: int
) -> list[int]:
    """The tokens that the noise picks after each of `nodes`; probs [len(nodes), V]."""
    levels = [tree.level(n) for n in nodes]
    depth = max(levels) + 1
    positions = range(position, position + depth)
    noise = rng.race(positions, Purpose.TARGET, probs.shape[-1], probs.device)
    if levels != list(range(depth)):  # a tree: siblings share their position's noise
        noise = noise[levels]
    return (probs / noise).argmax(-1).tolist()
