"""Typical acceptance: keep what the target finds plausible. Lossy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import TokenTree
from foretell.verify.walk import Settled


class Typical:
    """Accepts a drafted x iff p[x] > min(epsilon, delta exp(-H(p))), H being p's entropy in nats:
    a token has to be likely where the target is sure, less so where it is not. Of the accepted
    paths the longest stands, of those the most probable. The token behind it is drawn from p.

    epsilon 0.09 and delta = sqrt(epsilon) are what the paper's program uses. nucleus=0.9 replaces
    the test: x is accepted iff it lies in the smallest set of most probable tokens with that mass.
    Drafters propose their most probable tokens. At temperature 0 only the target's argmax passes.

    Paper: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding
    Heads" (2024). Promise: lossy (the accepted tokens are not draws from p).
    """

    name = "typical"
    promise = Promise.LOSSY
    paper = "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads"
    summary = "accept what the target finds plausible (lossy)"
    accepts = frozenset({"chain", "tree", "onehot", "q"})
    draw = Draw.TOP

    def __init__(
        self, epsilon: float = 0.09, delta: float | None = None, nucleus: float | None = None
    ) -> None:
        if not 0 <= epsilon <= 1 or (delta is not None and not 0 <= delta < math.inf):
            raise InputError("typical needs 0 <= epsilon <= 1 and delta >= 0.")
        if nucleus is not None and not 0 < nucleus <= 1:
            raise InputError("typical needs 0 < nucleus <= 1.")
        self.epsilon, self.nucleus = epsilon, nucleus
        self.delta = math.sqrt(epsilon) if delta is None else delta

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        nodes = tree.decisions()
        rows = Settled(p).probs(nodes)
        row = {node: i for i, node in enumerate(nodes)}
        drafts = nodes[1:]
        parents = [row[int(n)] for n in tree.parent[drafts]]
        tokens = tree.tokens[drafts].tolist()
        plausible = self.plausible(rows, parents, tokens)
        likely = rows[parents, tokens].tolist() if drafts else []
        score = {tree.tip: (0, 0.0)}  # accepted nodes: depth, log-probability of the path
        for node, good, q in zip(drafts, plausible, likely, strict=True):
            parent = score.get(int(tree.parent[node]))
            if good and parent is not None:
                score[node] = (parent[0] + 1, parent[1] + math.log(q))
        best = max(score, key=lambda n: score[n])
        path = tree.path(best)
        bonus = rng.pick(rows[row[best]], position + len(path))
        checked = len(path) + bool(tree.children(best))
        return Verdict(path, [*tree.tokens[path].tolist(), bonus], checked)

    def plausible(self, rows: Tensor, parents: list[int], tokens: list[int]) -> list[bool]:
        """Which drafted tokens pass; rows [n, V] target distributions, parents their rows."""
        if not tokens:
            return []
        likely = rows[parents, tokens]
        if self.nucleus is not None:
            above = torch.where(rows[parents] > likely[:, None], rows[parents], 0.0).sum(-1)
            return ((above < self.nucleus) & (likely > 0)).tolist()
        return (likely > typical_threshold(rows, self.epsilon, self.delta)[parents]).tolist()


def typical_threshold(p: Tensor, epsilon: float, delta: float) -> Tensor:
    """[n, V] distributions -> [n]: min(epsilon, delta exp(-entropy))."""
    entropy = torch.special.entr(p).sum(-1)
    return (delta * torch.exp(-entropy)).clamp(max=epsilon)
