"""What verification rules share: the walk with one answer per node, and the residual walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foretell.core.batch import Tap
from foretell.core.feedback import Verdict
from foretell.core.protocols import Draws, TargetRows
from foretell.core.tree import Kind, TokenTree

Test = Callable[[int, float, float, int, int], bool]
"""(node, what is left of p at its token, its q, position, index among its siblings) -> stands?"""


Ask = Callable[[Sequence[int]], list[int]]
"""Nodes -> the token that the target says after each of them."""

Step = tuple[int, int]  # (the child to go on from, -1), or (-1, the bonus token)


def answers(tree: TokenTree, p: TargetRows, ask: Ask) -> Callable[[int], int]:
    """What the target says after a node: asked node by node where the rows lie on the host, so that
    nothing is computed off the walk; on a device of all decision nodes at once, with one wait."""
    if p.host:
        return lambda node: ask([node])[0]
    nodes = tree.decisions()
    return dict(zip(nodes, ask(nodes), strict=True)).__getitem__


def argmaxes(tree: TokenTree, p: TargetRows) -> Callable[[int], int]:
    """The target's argmax after a node: looked up where it is known, else `answers`."""
    said: dict[int, int] | None = getattr(p, "said", None)
    return answers(tree, p, p.greedy) if said is None else said.__getitem__


def follow(tree: TokenTree, answer: Callable[[int], int]) -> Verdict:
    """Walk from the tip along children whose token is the answer at their parent.

    answer: the token the target says after a node; asked of the tip and the nodes walked along.
    The answer at the node where the walk ends is the bonus token.
    """
    current, path, tokens = tree.tip, [], []
    drafted, kinds, alive = tree.tokens.tolist(), tree.kind.tolist(), int(Kind.CANDIDATE)
    while True:
        want = answer(current)
        tokens.append(want)
        children = tree.children(current)
        for child in children:
            if drafted[child] == want and kinds[child] == alive:
                path.append(child)
                current = child
                break
        else:
            return Verdict(path, tokens, len(path) + bool(children))


def descend(
    tree: TokenTree, p: TargetRows, position: int, step: Callable[[Tensor, list[int], int], Step]
) -> Verdict:
    """Walk from the tip; `step(p row, children, position)` says, node by node, what comes next."""
    current, path = tree.tip, []
    while True:
        children = tree.children(current)
        hit, bonus = step(p.probs([current])[0], children, position + len(path))
        if hit < 0:
            tokens = [*(int(tree.tokens[n]) for n in path), bonus]
            return Verdict(path, tokens, len(path) + bool(children))
        path.append(hit)
        current = hit


def residual_walk(
    tree: TokenTree, p: TargetRows, rng: Draws, position: int, test: Test | None = None
) -> Verdict:
    """The recursive rejection walk: siblings in turn, then a token of what they left of p.

    test: whether a node stands, by default with probability min(1, p / q).
    """

    def ratio(node: int, left: float, q: float, here: int, index: int) -> bool:
        return rng.flip(left, q, here, index)

    def step(full: Tensor, children: list[int], here: int) -> Step:
        hit, rest = refuse_in_turn(tree, full, children, here, test or ratio)
        return (hit, -1) if hit >= 0 else (-1, rng.pick(rest, here))

    return descend(tree, p, position, step)


def refuse_in_turn(
    tree: TokenTree, full: Tensor, children: Sequence[int], here: int, test: Test
) -> tuple[int, Tensor]:
    """Try siblings in draw order: (the one that stands or -1, what the refusals left of `full`).

    full: p [V] at their parent. A refused child drawn from row Q turns P into the normalised
    positive part of P - Q, and Q loses it (siblings of one row were drawn without replacement; a
    sibling with a row of its own is untouched by that). A refused one-hot child is taken from P.
    """
    rest, rows = full, {}
    for index, child in enumerate(children):
        x, row = int(tree.tokens[child]), row_of(tree, child)
        if row < 0:
            if test(child, float(rest[x]), 1.0, here, index):
                return standing(tree, children, child), rest
            rest = rest.clone()
            rest[x] = 0
        else:
            if row not in rows:
                rows[row] = q_row(tree, row, rest).clone()
            q = rows[row]
            if test(child, float(rest[x]), float(q[x]), here, index):
                return standing(tree, children, child), rest
            rest = (rest - q).clamp_(min=0)
            q[x] = 0
            q /= q.sum().clamp(min=1e-30)
        total = rest.sum()
        # p == q up to rounding: the refusal had probability zero; fall back on p itself.
        rest = rest / total if total > 0 else full
    return -1, rest


def row_of(tree: TokenTree, node: int) -> int:
    """The q row the node was drawn from, -1 = one-hot."""
    return -1 if tree.qrow is None else int(tree.qrow[node])


def q_row(tree: TokenTree, row: int, like: Tensor) -> Tensor:
    """[V], in the type and on the device of `like`."""
    assert tree.q is not None, "a node with a q row belongs to a tree with q"
    return tree.q[row].to(like)


def standing(tree: TokenTree, siblings: Sequence[int], node: int) -> int:
    """The node that carries on for `node`: itself, or, for a repeated draw (DEAD, without a row),
    the first sibling with its token."""
    if tree.kind[node] == Kind.CANDIDATE:
        return node
    token, alive = tree.tokens[node], int(Kind.CANDIDATE)
    for other in siblings:
        if tree.tokens[other] == token and tree.kind[other] == alive:
            return other
    raise AssertionError("a forbidden token was accepted: the target's row does not exclude it")


class Settled:
    """The target's rows as a rule should see them: at temperature 0 all mass is on the argmax."""

    def __init__(self, p: TargetRows) -> None:
        self.p, self.deterministic, self.host = p, p.deterministic, p.host

    def greedy(self, nodes: Sequence[int]) -> list[int]:
        return self.p.greedy(nodes)

    def probs(self, nodes: Sequence[int], read: Sequence[int] | None = None) -> Tensor:
        rows = self.p.probs(nodes, read)
        if not self.deterministic:
            return rows
        best = torch.tensor(self.p.greedy(nodes), device=rows.device)
        return torch.zeros_like(rows).scatter_(1, best[:, None], 1)

    def raw(self, node: int) -> tuple[Tensor, float] | None:
        return None if self.deterministic else self.p.raw(node)

    def hidden(self, tap: Tap, nodes: Sequence[int]) -> Tensor:
        return self.p.hidden(tap, nodes)
