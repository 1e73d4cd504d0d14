"""The union of several one-hot trees: what it holds, what is likeliest in it, what came true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from foretell.core.tree import as_list
from foretell.drafters.tables.sketch import Sketch
from foretell.drafters.tables.trust import Cell, Trust, said


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

    def add(self, sketch: Sketch, part: int, parts: int) -> None:
        """Hang in what drafter `part` of so many made."""
        if not len(sketch.tokens):
            return
        tokens, parents, levels = map(as_list, sketch[:3])
        marks, n = _marks(parents, sketch.scores), len(tokens)
        at = dict(zip(zip(parents, tokens, strict=True), range(n), strict=True))
        if not self.tokens and len(at) == n:
            self.tokens, self.parents, self.levels, self.at = tokens, parents, levels, at
            before, behind = [0] * part, [0] * (parts - part - 1)
            self.marks = [[*before, mark, *behind] for mark in marks]
            return
        place = {-1: -1}
        for i, mark in enumerate(marks):
            key = place[parents[i]], tokens[i]
            node = self.at.get(key)
            if node is None:
                node = self.at[key] = len(self.tokens)
                self.tokens.append(tokens[i])
                self.parents.append(key[0])
                self.levels.append(levels[i])
                self.marks.append([0] * parts)
            self.marks[node][part] = mark
            place[i] = node

    def chances(self, trust: Trust) -> tuple[list[float], list[float]]:
        """Of each node, given its parent, and of its path."""
        now, cell = trust.now, trust.cell
        self.cells = [cell(d, tuple(m)) for d, m in zip(self.levels, self.marks, strict=True)]
        own = [c.chance(now) for c in self.cells]
        paths: list[float] = []
        for chance, above in zip(own, self.parents, strict=True):
            paths.append(chance * paths[above] if above >= 0 else chance)
        return own, paths


def _marks(parents: list[int], scores: Sequence[float] | np.ndarray | None) -> list[int]:
    if scores is not None:
        return [said(score, 0) for score in as_list(scores)]
    marks: list[int] = []
    siblings: dict[int, int] = {}
    for above in parents:
        rank = siblings.get(above, 0)
        siblings[above] = rank + 1
        marks.append(said(None, rank))
    return marks


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
