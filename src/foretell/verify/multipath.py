"""Greedy multi-path block verification: the best of K chains, verified as a block."""

from __future__ import annotations

import torch
from torch import Tensor

from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import Kind, TokenTree
from foretell.verify.block import q_rows, verify_block
from foretell.verify.walk import residual_walk, row_of


class MultiPath:
    """Selects one of K independently drafted chains and runs block verification on it, with the law
    of the selected chain in the place of q.

    At every prefix tokens are ranked by p / q; the selected chain is the lexicographically best, so
    the walk takes the best-ranked child of every node. With A the mass of all better prefixes and m
    that of the prefix itself, the selected chain begins with it with probability
    (1 - A)^K - (1 - A - m)^K, whose quotients are the law that block verification needs. The other
    chains are dropped. More chains are not always better: selection tilts the law it verifies with.
    A tree without q rows has no law to tilt and is verified in turn, as `rejection` does.

    Paper: "Greedy Multi-Path Block Verification for Faster Decoding in Speculative Sampling"
    (arXiv 2602.16961); its selection is reconstructed here from what is published, and its law is
    proved by enumeration in the tests. Promise: lossless.
    """

    name = "multipath"
    promise = Promise.LOSSLESS
    paper = "Greedy Multi-Path Block Verification for Faster Decoding in Speculative Sampling"
    summary = "block verification of the best of K drafted chains"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.PATHS

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        drawn = [row_of(tree, n) >= 0 for n in range(tree.n_context, len(tree))]
        first = tree.children(tree.tip)
        if not any(drawn) and not (first and row_of(tree, first[0]) >= 0):
            return residual_walk(tree, p, rng, position)
        paths, nodes, rows, laws = len(first), [tree.tip], [], []
        better, mass, through = 0.0, 1.0, paths
        while tree.kind[nodes[-1]] != Kind.DEAD:
            rows.append(p.probs([nodes[-1]])[0])
            children = tree.children(nodes[-1])
            if not children:
                break
            assert len(children) == through, "the tree does not hold K chains of one length"
            q = q_rows(tree, [nodes[-1], children[0]], rows[-1])[0]
            ranks, law, before = selection(rows[-1], q, paths, better, mass)
            tokens = tree.tokens[children].tolist()
            x = tokens[int(ranks[tokens].argmin())]
            twins = [c for c, token in zip(children, tokens, strict=True) if token == x]
            alive = [c for c in twins if tree.kind[c] == Kind.CANDIDATE]
            nodes.append((alive or twins)[0])
            laws.append(law)
            through = len(twins)
            better, mass = better + mass * float(before[x]), mass * float(q[x])
        seen = torch.stack(rows)
        q = torch.stack(laws).to(seen) if laws else seen[:0]
        return verify_block(tree, nodes, seen, q, rng, position)


def selection(
    p: Tensor, q: Tensor, paths: int, better: float, mass: float
) -> tuple[Tensor, Tensor, Tensor]:
    """How the best of `paths` chains goes on after a prefix.

    p, q [V]: the target's and the drafter's distribution of the next token; better: the mass of all
    prefixes of this length that rank before this one; mass: that of the prefix itself.
    Returns, all [V]: the rank of every token, the law of the selected chain's next token, and for
    every token the part of q that ranks before it.
    """
    wide_q = q.double()
    ratio = torch.where(q > 0, p.double() / wide_q.clamp(min=1e-300), -1.0)
    order = ratio.sort(descending=True, stable=True).indices
    sums = wide_q[order].cumsum(0)
    before = torch.empty_like(sums)
    before[order] = sums - wide_q[order]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    # a^K - b^K = (a - b) * sum of a^i b^(K-1-i): no cancellation, and a - b is the token's mass.
    high = (1 - better - mass * before).clamp_(min=0)
    low = (high - mass * wide_q).clamp_(min=0)
    law = wide_q * sum(high**i * low ** (paths - 1 - i) for i in range(paths))
    return ranks, law / law.sum(), before
