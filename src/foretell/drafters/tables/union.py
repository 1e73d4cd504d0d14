"""The union of several one-hot trees: what it holds, what is likeliest in it, what came true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foretell.core.tree import Kind, TokenTree
from foretell.drafters.tables.trust import Cell, Trust, said

CANDIDATE = int(Kind.CANDIDATE)


@dataclass(slots=True)
class Union:
    """The paths of several trees without duplicates, parents first: token, parent (-1 = the tip),
    level (1 = child of the tip), and what each drafter said of the node."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    marks: list[list[int]] = field(default_factory=list)
    at: dict[tuple[int, int], int] = field(default_factory=dict)  # (parent, token) -> node
    cells: list[Cell] = field(default_factory=list)  # what is known of such nodes

    def add(self, tree: TokenTree, part: int, parts: int) -> None:
        """Hang in the candidates of a tree that drafter `part` of so many made."""
        c, n = tree.n_context, len(tree)
        if n == c:
            return
        place, siblings = {c - 1: -1}, dict[int, int]()
        tokens, parents, kinds = tree.tokens.tolist(), tree.parent.tolist(), tree.kind.tolist()
        scores = None if tree.score is None else tree.score.tolist()
        for i in range(c, n):
            above = place.get(parents[i])
            if above is None or kinds[i] != CANDIDATE:
                continue
            if scores is None:
                rank = siblings.get(above, 0)
                siblings[above] = rank + 1
                mark = said(None, rank)
            else:
                mark = said(scores[i], 0)
            key = above, tokens[i]
            node = self.at.get(key)
            if node is None:
                node = self.at[key] = len(self.tokens)
                self.tokens.append(tokens[i])
                self.parents.append(above)
                self.levels.append(1 if above < 0 else self.levels[above] + 1)
                self.marks.append([0] * parts)
            self.marks[node][part] = mark
            place[i] = node

    def chances(self, trust: Trust) -> list[float]:
        """Of each node, given its parent."""
        now, cell = trust.now, trust.cell
        self.cells = [cell(d, tuple(m)) for d, m in zip(self.levels, self.marks, strict=True)]
        return [c.chance(now) for c in self.cells]


def likeliest(values: Sequence[float], parents: Sequence[int], branching: int) -> list[int]:
    """Nodes in falling order of the chance of their path, no parent with more than `branching`
    children; a parent comes before its children."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)  # and stable
    if branching >= len(values):
        return order
    room, found = {-1: branching}, []
    for i in order:
        if room.get(parents[i], 0) > 0:
            room[parents[i]] -= 1
            room[i] = branching
            found.append(i)
    return found


def judge(union: Union, tokens: Sequence[int], trust: Trust) -> None:
    """Tell `trust` which of the proposed nodes the emitted tokens bear out: of every node whose
    parent came, whether it came."""
    trust.judged += 1
    if not union.cells:
        return
    below: dict[int, list[int]] = {}
    for i, above in enumerate(union.parents):
        below.setdefault(above, []).append(i)
    node = -1
    for token in tokens:
        came = -2
        for child in below.get(node, ()):
            hit = union.tokens[child] == token
            trust.saw(union.cells[child], hit)
            came = child if hit else came
        if came < -1:
            return
        node = came
