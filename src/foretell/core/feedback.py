"""What a step leaves behind: the verdict, and what drafters learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from foretell.core.batch import Tap
from foretell.core.rows import argmax_rows
from foretell.core.tree import TokenTree

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Rows:
    """A lazy view of one sequence's rows in a packed tensor, addressed by tree node.

    Valid until the next forward. A node without a row (DEAD, or not asked for) raises KeyError.
    """

    packed: Tensor  # [R, X]
    row: np.ndarray  # [N] int64, packed row of each node, -1 = none
    best: np.ndarray | None = None  # [R] int64, the column of each row's largest entry (`Output`)
    _host: np.ndarray | None = field(default=None, repr=False)  # packed, where it lies on a CPU

    def __getitem__(self, nodes: int | Sequence[int]) -> Tensor:
        """[X] for one node, [k, X] for several."""
        rows = self.row[nodes].tolist()
        if isinstance(rows, int):
            if rows < 0:
                raise KeyError(f"no row was computed for node {nodes}")
            return self.packed[rows]
        if rows and min(rows) < 0:
            raise KeyError(f"no row was computed for one of the nodes {nodes}")
        if rows and rows == list(range(rows[0], rows[0] + len(rows))):
            return self.packed[rows[0] : rows[0] + len(rows)]
        return self.packed[rows]

    def argmax(self, nodes: Sequence[int]) -> list[int]:
        """`argmax_rows` of the nodes' rows, looked up where the model has found it. Of one on a CPU
        without any tensor in between, which would take longer than the search."""
        if self.best is not None:
            rows = self.row[nodes]
            if (rows < 0).any():
                raise KeyError(f"no row was computed for one of the nodes {nodes}")
            return self.best[rows].tolist()
        if len(nodes) != 1:
            return argmax_rows(self[nodes])
        if self._host is None:
            if self.packed.device.type != "cpu":
                return argmax_rows(self[nodes])
            self._host = self.packed.numpy()
        row = self.row[nodes[0]]
        if row < 0:
            raise KeyError(f"no row was computed for node {nodes[0]}")
        return [int(self._host[row].argmax())]

    @property
    def known(self) -> dict[int, int] | None:
        """Node -> `argmax` of it, of all nodes with a row, where the model has found them."""
        if self.best is None:
            return None
        best = self.best.tolist()
        return {node: best[row] for node, row in enumerate(self.row.tolist()) if row >= 0}

    def has(self, node: int) -> bool:
        return bool(self.row[node] >= 0)


@dataclass(slots=True)
class Verdict:
    """What a verifier decided about one tree.

    ``tokens`` are the ids to emit: those of the accepted `path`, then one bonus token (absent after
    a cut that fell inside the path).
    """

    path: list[int]  # accepted nodes, from the tip downwards
    tokens: list[int]  # len(path) + 1 ids, until cut
    checked: int = (
        0  # levels at which a candidate was tried: len(path), plus one if one was refused
    )

    @property
    def accepted(self) -> int:
        return len(self.path)

    def cut(self, keep: int) -> None:
        """Keep only the first `keep` emitted tokens (stop strings, EOS, max_tokens)."""
        self.tokens = self.tokens[:keep]
        self.path = self.path[:keep]
        self.checked = min(self.checked, keep)


@dataclass(slots=True)
class Feedback:
    """What a drafter gets after every step, prefill included (there the path is the prompt).

    ``logits`` are the RAW target logits at every node that was computed, rejected ones too.
    """

    tokens: list[int]  # ids emitted by the step
    path: list[int]  # nodes now committed: CONTEXT first, then the accepted ones
    tree: TokenTree
    logits: Rows
    verdict: Verdict
    hidden: dict[Tap, Rows] = field(default_factory=dict)  # the taps the drafter declared
