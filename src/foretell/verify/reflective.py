"""Reflective verification: the target is asked, in the same forward, about the draft. Lossy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from foretell.core.errors import InputError
from foretell.core.feedback import Verdict
from foretell.core.protocols import BuildContext, Draw, Draws, Promise, SeqView, TargetRows
from foretell.core.rows import argmax_rows
from foretell.core.tree import Kind, TokenTree
from foretell.verify.walk import Settled, residual_walk

PROMPT = " Check the continuation above. Corrected continuation:"


@dataclass(slots=True)
class ProbedTree(TokenTree):
    """A tree with a probe: node `asked[n]` is the rider whose row predicts candidate n again."""

    asked: dict[int, int] = field(default_factory=dict)


class Reflective:
    """Fuses two opinions of the target about each drafted token: o, from its usual row, and r, from
    a second reading. Behind the drafted chain d_1..d_n the same forward reads a reflection prompt R
    and d_1..d_{n-1} again, as RIDER nodes; r of d_i is the row before its second copy. A token is
    tested as in `rejection` with z = (1 - weight) o + weight r in the place of o (at temperature 0:
    it stands iff it is z's argmax). What is emitted after the accepted ones comes from o alone.

    weight 0 adds nothing to the forward and is `rejection`, draw for draw. A step has no second
    reading where the riders do not fit (KV rows, the model's context). Costs |R| + n - 1 rows.

    Paper: "Think Before You Accept: Semantic Reflective Verification for Faster Speculative
    Decoding" (2025); prompt and weight are not published, so both are options. Promise: lossy.
    """

    name = "reflective"
    promise = Promise.LOSSY
    paper = (
        "Think Before You Accept: Semantic Reflective Verification for Faster Speculative Decoding"
    )
    summary = "ask the target about the draft in the same forward and fuse both answers (lossy)"
    accepts = frozenset({"chain", "onehot", "q"})
    draw = Draw.SAMPLE

    def __init__(self, prompt: Sequence[int], weight: float = 0.3, trees: bool = True) -> None:
        if not 0 <= weight <= 1:
            raise InputError("reflective needs a weight between 0 and 1.")
        if weight and not prompt:
            raise InputError("reflective needs a prompt of at least one token.")
        self.prompt, self.weight, self.trees = list(prompt), weight, trees

    @classmethod
    def build(
        cls, context: BuildContext, weight: float = 0.3, prompt: str | None = None
    ) -> Reflective:
        """`prompt`: the reflection prompt R as text."""
        ids: list[int] = []
        if weight:
            if context.tokenizer is None:
                raise InputError("reflective needs a tokenizer to ask its question with.")
            ids = context.tokenizer.encode(PROMPT if prompt is None else prompt, add_special=False)
        return cls(ids, weight, context.target.spec.caps.tree)

    def extend(self, tree: TokenTree, view: SeqView, room: int) -> TokenTree:
        """`tree` with the probe behind its chain, if it takes no more than `room` rows."""
        drafted = [n for n in range(tree.n_context, len(tree)) if tree.kind[n] != Kind.RIDER]
        alive = [n for n in drafted if tree.kind[n] == Kind.CANDIDATE]
        again = alive[:-1]
        riders = [*self.prompt, *tree.tokens[again].tolist()]
        gaps = len(tree) != (alive[-1] + 1 if alive else 0)  # the riders would make it a tree
        if not self.weight or not alive or len(riders) > room or (gaps and not self.trees):
            return tree
        first = len(tree)
        asked = {n: first + len(self.prompt) - 1 + i for i, n in enumerate(alive)}
        return _append(tree, riders, alive[-1], asked)

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        asked = tree.asked if isinstance(tree, ProbedTree) else {}
        if not asked:
            return residual_walk(tree, Settled(p), rng, position)
        nodes = list(asked)
        parents = tree.parent[nodes].tolist()
        tokens = tree.tokens[nodes].tolist()
        usual, second = p.probs(parents), p.probs(parents, read=list(asked.values()))
        fused = (1 - self.weight) * usual + self.weight * second
        best = dict(zip(nodes, argmax_rows(fused), strict=True))
        fit = dict(zip(nodes, fused[range(len(nodes)), tokens].tolist(), strict=True))

        def test(node: int, left: float, q: float, here: int, index: int) -> bool:
            if p.deterministic and node in best:
                return best[node] == int(tree.tokens[node])
            return rng.flip(fit.get(node, left), q, here, index)

        return residual_walk(tree, Settled(p), rng, position, test)


def _append(
    tree: TokenTree, riders: Sequence[int], parent: int, asked: dict[int, int]
) -> ProbedTree:
    """Hang a chain of RIDER nodes below `parent`."""
    n, m = len(tree), len(riders)
    parents = np.arange(n - 1, n - 1 + m)
    parents[0] = parent

    def longer(old: np.ndarray | None, new: object) -> np.ndarray | None:
        return None if old is None else np.concatenate([old, np.broadcast_to(np.asarray(new), m)])

    return ProbedTree(
        np.concatenate([tree.tokens, np.asarray(riders, np.int64)]),
        np.concatenate([tree.parent, parents]),
        np.concatenate([tree.kind, np.full(m, Kind.RIDER, np.int8)]),
        np.concatenate([tree.depth, tree.depth[parent] + 1 + np.arange(m)]),
        longer(tree.qrow, -1),
        tree.q,
        longer(tree.score, 1.0),
        longer(tree.source, -1),
        tree.embeds,
        asked=asked,
    )
