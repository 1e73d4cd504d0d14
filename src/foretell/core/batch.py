"""A packed forward: the rows of several sequences behind one another, without padding."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from foretell.core.tree import TokenTree, counted

if TYPE_CHECKING:
    from torch import Tensor

Tap = Hashable  # "embed", "last" (after the final norm), or a layer index l (the input of layer l)


@dataclass(slots=True)
class Segment:
    """The rows one sequence adds in one forward (none at all is allowed).

    The keys a row may see are the sequence's committed cache rows (always, minus what a sliding
    window hides) and, of the rows its open transaction holds, those that `ancestors` names.
    """

    tokens: np.ndarray  # [n] int64
    positions: np.ndarray  # [n] int64, absolute positions; siblings share one
    ancestors: np.ndarray | None = None
    """[n, s + n] bool over the transaction's rows: s from its earlier forwards, then these n.
    None means a chain: row i sees all s earlier rows and rows 0..i of its own."""
    logits: np.ndarray | None = None  # local rows whose logits are wanted; None = all
    embeds: dict[int, Tensor] | None = None  # local row -> [H] instead of the token's embedding

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class PackedBatch:
    """T rows of B sequences; segment b belongs to cache b of the transaction it is run with."""

    segments: list[Segment]
    offsets: list[int] = field(init=False)  # [B + 1] first packed row of each segment
    logit_offsets: list[int] = field(init=False)  # [B + 1] the same among the rows with logits

    def __post_init__(self) -> None:
        self.offsets, self.logit_offsets = [0], [0]
        for s in self.segments:
            wanted = len(s) if s.logits is None else len(s.logits)
            self.offsets.append(self.offsets[-1] + len(s))
            self.logit_offsets.append(self.logit_offsets[-1] + wanted)

    @property
    def rows(self) -> int:
        """T."""
        return self.offsets[-1]

    def logit_rows(self) -> np.ndarray | None:
        """[R] packed rows whose logits are wanted, segment by segment; None = all T."""
        if all(s.logits is None for s in self.segments):
            return None
        parts = [
            (np.arange(len(s)) if s.logits is None else s.logits) + o
            for s, o in zip(self.segments, self.offsets, strict=False)
        ]
        return np.concatenate(parts)


@dataclass(slots=True)
class Output:
    """What a forward returns: logits [R, V] of the rows asked for, hidden states by tap [T, H]."""

    logits: Tensor
    hidden: dict[Tap, Tensor] = field(default_factory=dict)
    best: np.ndarray | None = None
    """[R] int64: the column of each row's largest logit, as numpy's argmax has it, from models that
    find it on the host while they make the row. It belongs to these very logits: whoever changes a
    row, in place or by putting another tensor here, sets this to None."""


def segment_of(tree: TokenTree, start: int, logits: Sequence[int] | None) -> Segment:
    """The rows of `tree` for a sequence whose cache holds `start` rows.

    logits: node indices whose logits are wanted (DEAD ones are skipped), None = all live ones.
    """
    live, wanted = tree.live, None
    if isinstance(logits, range) and logits.step == 1:  # numpy takes a range number by number
        wanted = counted(logits.start, logits.stop)
    elif logits is not None:
        wanted = np.asarray(logits, np.int64)
    if len(live) == len(tree):
        ancestors = None if tree.is_chain else tree.ancestors()
        return Segment(tree.tokens, start + tree.depth, ancestors, wanted, tree.embeds)
    ancestors = None if tree.is_chain else tree.ancestors()[np.ix_(live, live)]
    if wanted is not None:
        row = np.full(len(tree), -1, np.int64)
        row[live] = np.arange(len(live))
        wanted = row[wanted]
        wanted = wanted[wanted >= 0]
    embeds = None
    if tree.embeds is not None:
        embeds = {i: tree.embeds[n] for i, n in enumerate(live.tolist()) if n in tree.embeds}
    return Segment(tree.tokens[live], start + tree.depth[live], ancestors, wanted, embeds)
