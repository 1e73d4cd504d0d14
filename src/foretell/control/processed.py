"""What a verifier sees of the target: rows that are processed when it asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from foretell.control.processors import Processors
from foretell.core.batch import Tap
from foretell.core.feedback import Rows
from foretell.core.protocols import NodeMasks
from foretell.core.rows import argmax_rows
from foretell.core.tree import TokenTree


class ProcessedRows:
    """The target's rows of one sequence, processed when a verifier asks (`TargetRows`)."""

    def __init__(
        self,
        rows: Rows,
        tree: TokenTree,
        processors: Processors,
        masks: NodeMasks | None,
        hidden: Mapping[Tap, Rows] = MappingProxyType({}),
    ) -> None:
        self.rows, self.tree, self.processors, self.masks = rows, tree, processors, masks
        self.states = hidden
        self.deterministic = processors.params.greedy
        self.host = rows.best is not None or rows.packed.device.type == "cpu"
        self.as_made = not processors.adjusts and masks is None
        """Whether nothing changes which logit of a row is the largest."""

    def greedy(self, nodes: Sequence[int]) -> list[int]:
        if self.as_made:
            return self.rows.argmax(nodes)
        logits = self.rows[nodes]
        logits = self.processors.legal(logits, self._paths(nodes), self._mask(nodes, logits))
        return argmax_rows(logits)

    @property
    def said(self) -> dict[int, int] | None:
        """Node -> `greedy` of it, of all nodes with a row, where nobody need look for it."""
        return self.rows.known if self.as_made else None

    def probs(self, nodes: Sequence[int], read: Sequence[int] | None = None) -> Tensor:
        logits = self.rows[nodes if read is None else read]
        return self.processors.probs(logits, self._paths(nodes), self._mask(nodes, logits))

    def raw(self, node: int) -> tuple[Tensor, float] | None:
        if self.masks is not None or not self.processors.plain:
            return None
        return self.rows[node], self.processors.params.temperature or 1.0

    def hidden(self, tap: Tap, nodes: Sequence[int]) -> Tensor:
        return self.states[tap][nodes]

    def _paths(self, nodes: Sequence[int]) -> list[list[int]]:
        if not self.processors.adjusts:
            return []
        return [self.tree.path_tokens(n) for n in nodes]

    def _mask(self, nodes: Sequence[int], logits: Tensor) -> Tensor | None:
        if self.masks is None:
            return None
        bits = np.ascontiguousarray(self.masks.bits[list(nodes)]).view(np.uint8)
        allowed = np.unpackbits(bits, axis=-1, bitorder="little")[:, : logits.shape[-1]]
        return torch.from_numpy(allowed).to(logits.device, torch.bool)
