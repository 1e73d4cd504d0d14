"""Block verification: a chain is accepted as a whole, not token by token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from foretell.core.feedback import Verdict
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import Kind, TokenTree
from foretell.verify.walk import q_row, row_of


class Block:
    """Keeps the longest prefix of a drafted chain that passes the block test.

    With P_0 = 1 and P_i = min(1, P_{i-1} p[x_i] / q[x_i]) the prefix of length i passes with
    probability S_i / (S_i + 1 - P_i), S_i being the sum of the positive part of P_i p - q after it
    (P_i itself for the whole chain); every length is tested, with noise of its own, and the longest
    that passes stands. The next token is drawn from the positive part of P_i p - q. A one-hot token
    counts as drawn from the distribution that is certain of it. Accepts, in expectation, at least
    as many tokens as token-level rejection, and no rule for one drafted chain accepts more.

    Paper: Sun et al., "Block Verification Accelerates Speculative Decoding" (2025).
    Promise: lossless.
    """

    name = "block"
    promise = Promise.LOSSLESS
    paper = "Block Verification Accelerates Speculative Decoding"
    summary = "accept the longest prefix of a chain that passes a joint test"
    accepts = frozenset({"chain", "onehot", "q"})
    draw = Draw.SAMPLE

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        nodes = [tree.tip]
        while children := tree.children(nodes[-1]):
            assert len(children) == 1, "block verification is for chains"
            nodes.append(children[0])
        nodes, rows = p_rows(tree, nodes, p)
        return verify_block(tree, nodes, rows, q_rows(tree, nodes, rows), rng, position)


def p_rows(tree: TokenTree, nodes: list[int], p: TargetRows) -> tuple[list[int], Tensor]:
    """The chain `nodes` (tip first) up to its first DEAD node, and the target's rows at all of them
    but that one. A dead node is never accepted, so nothing behind it matters."""
    dead = [i for i, n in enumerate(nodes) if tree.kind[n] == Kind.DEAD]
    if dead:
        return nodes[: dead[0] + 1], p.probs(nodes[: dead[0]])
    return nodes, p.probs(nodes)


def q_rows(tree: TokenTree, nodes: Sequence[int], like: Tensor) -> Tensor:
    """[len(nodes) - 1, V]: the distributions that nodes[1:] were drawn from."""
    q = like.new_zeros(len(nodes) - 1, like.shape[-1])
    for i, node in enumerate(nodes[1:]):
        row = row_of(tree, node)
        if row < 0:
            q[i, int(tree.tokens[node])] = 1
        else:
            q[i] = q_row(tree, row, like)
    return q


def verify_block(
    tree: TokenTree, nodes: list[int], p: Tensor, q: Tensor, rng: Draws, position: int
) -> Verdict:
    """The block test along `nodes` (tip first); p [n or n + 1, V], q [n, V] for n drafted nodes.

    p lacks the row behind the last node where that node is DEAD. The noise is keyed by the round's
    position and the length tested: this round looks at all of it, and no later one does.
    """
    tokens = tree.tokens[nodes[1:]].tolist()
    mass, chances = block_chances(p, q, tokens)
    length = 0
    for i, chance in enumerate(chances, 1):
        if rng.flip(chance, 1.0, position, i):
            length = i
    rest = p[length]
    if length < len(tokens):
        left = (mass[length] * rest - q[length]).clamp_(min=0)
        rest = left if left.sum() > 0 else rest  # nothing left: p == q up to rounding
    bonus = rng.pick(rest, position + length)
    checked = min(length + 1, len(tokens))
    return Verdict(nodes[1 : length + 1], [*tokens[:length], bonus], checked)


def block_chances(p: Tensor, q: Tensor, tokens: Sequence[int]) -> tuple[list[float], list[float]]:
    """(P_0..P_n, h_1..h_n) of a chain of n tokens: prefix i passes its test with chance h_i.

    p [n or n + 1, V] target rows, q [n, V] the rows the tokens were drawn from.
    """
    n = len(tokens)
    if not n:
        return [1.0], []
    at = list(range(n))
    over, under = p[at, list(tokens)].tolist(), q[at, list(tokens)].tolist()
    mass = [1.0]
    for a, b in zip(over, under, strict=True):
        mass.append(min(1.0, mass[-1] * a / b) if b > 0 else 0.0)
    scale = p.new_tensor(mass[1:n])[:, None]
    left = (scale * p[1:n] - q[1:n]).clamp_(min=0).sum(-1).tolist()
    chances = [1.0 if m >= 1 else s / (s + 1 - m) for m, s in zip(mass[1:n], left, strict=True)]
    return mass, [*chances, mass[n]]
