"""Rejection sampling over chains and trees: the classic lossless rule."""

from __future__ import annotations

from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import TokenTree


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
        current, path = tree.tip, []
        while True:
            here = position + len(path)
            full = p.probs([current])[0]
            rest, hit, rows = full.clone(), -1, {}
            children = tree.children(current)
            for index, child in enumerate(children):
                x = int(tree.tokens[child])
                row = -1 if tree.qrow is None else int(tree.qrow[child])
                if row < 0:
                    if rng.flip(float(rest[x]), 1.0, here, index):
                        hit = child
                        break
                    rest[x] = 0
                else:
                    if row not in rows:
                        assert tree.q is not None, "a node with a q row belongs to a tree with q"
                        rows[row] = tree.q[row].to(rest.dtype).clone()
                    q = rows[row]
                    if rng.flip(float(rest[x]), float(q[x]), here, index):
                        hit = child
                        break
                    rest = (rest - q).clamp_(min=0)
                    q[x] = 0
                    q /= q.sum().clamp(min=1e-30)
                total = rest.sum()
                # p == q up to rounding: the refusal had probability zero; fall back on p itself.
                rest = rest / total if total > 0 else full.clone()
            if hit < 0:
                accepted = [int(tree.tokens[n]) for n in path]
                bonus = rng.pick(rest, here)
                return Verdict(path, [*accepted, bonus], len(path) + bool(children))
            path.append(hit)
            current = hit
