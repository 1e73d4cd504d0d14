"""The token tree: what one sequence feeds to one forward of the target.

A tree holds the pending context (a chain of committed ids whose KV rows are missing) and, below
its last node (the *tip*), whatever a drafter proposes. Arrays live on the host (numpy): trees are
small, and the walk that verifies them is scalar work. Draft distributions `q` stay tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Kind(IntEnum):
    """What becomes of a node."""

    CONTEXT = 0  # already committed text; always kept
    CANDIDATE = 1  # drafted; the verifier decides
    DEAD = 2  # known illegal: not computed, but still rejected by the verifier (with its q)
    RIDER = 3  # computed, never verified (lookahead windows, prompt tokens)


@dataclass(slots=True)
class TokenTree:
    """N nodes in topological order, CONTEXT nodes first; a chain iff ``parent[i] == i - 1``.

    Sibling order is draw order: a verifier that uses q relies on it, so nobody re-sorts or removes
    nodes that carry a q row; illegal ones are `kill`ed instead.
    """

    tokens: np.ndarray  # [N] int64
    parent: np.ndarray  # [N] int64, -1 for the first node
    kind: np.ndarray  # [N] int8, values of Kind
    depth: np.ndarray  # [N] int64, position offset from the first node; siblings share it
    qrow: np.ndarray | None = None  # [N] int64, row of q the node was drawn from; -1 = one-hot
    q: Tensor | None = None  # [M, V] draft distributions in the target's vocabulary
    score: np.ndarray | None = None  # [N] float, drafter confidence; never used for acceptance
    source: np.ndarray | None = None  # [N] int, which drafter proposed the node
    embeds: dict[int, Tensor] | None = None  # node -> [H], trained prompt tokens instead of ids
    _children: list[list[int]] | None = field(default=None, repr=False)
    _n_context: int = field(default=-1, repr=False)
    _live: np.ndarray | None = field(default=None, repr=False)
    _chain: bool | None = field(default=None, repr=False)

    @classmethod
    def context(cls, tokens: Sequence[int]) -> TokenTree:
        """The tree without drafts: a chain of CONTEXT nodes over `tokens` (at least one)."""
        n = len(tokens)
        ids = np.array(tokens, np.int64)
        return cls(
            *(ids, counted(-1, n - 1), np.zeros(n, np.int8), counted(0, n)),
            _n_context=n, _chain=True,
        )  # fmt: skip

    @classmethod
    def build(
        cls,
        context: Sequence[int],
        tokens: Sequence[int],
        parents: Sequence[int],
        *,
        qrow: Sequence[int] | None = None,
        q: Tensor | None = None,
        score: Sequence[float] | None = None,
        kind: Kind = Kind.CANDIDATE,
    ) -> TokenTree:
        """Hang drafted `tokens` below the context's tip.

        parents: for each drafted token the index of its parent among the drafted tokens,
        -1 for the tip. Parents come first. qrow/score are per drafted token.
        """
        c, n = len(context), len(tokens)
        steps = np.arange(c, dtype=np.int64)
        parent = np.empty(c + n, np.int64)
        parent[:c] = steps - 1
        parent[c:] = np.asarray(parents, np.int64) + c  # -1 + c is the tip
        depth = np.empty(c + n, np.int64)
        depth[:c] = steps
        for i in range(c, c + n):
            depth[i] = depth[parent[i]] + 1
        kinds = np.full(c + n, kind, np.int8)
        kinds[:c] = Kind.CONTEXT
        rows = scores = None
        if qrow is not None:
            rows = np.full(c + n, -1, np.int64)
            rows[c:] = qrow
        if score is not None:
            scores = np.ones(c + n)
            scores[c:] = score
        ids = np.asarray([*context, *tokens], np.int64)
        return cls(ids, parent, kinds, depth, rows, q, scores)

    @classmethod
    def chain(
        cls,
        context: Sequence[int],
        tokens: Sequence[int],
        *,
        q: Tensor | None = None,
        score: Sequence[float] | None = None,
    ) -> TokenTree:
        """Hang a chain below the tip; with `q` [len(tokens), V] row i drew token i."""
        if q is None:
            c, n = len(context), len(context) + len(tokens)
            ids = np.array([*context, *tokens], np.int64)
            scores = None if score is None else np.array([1.0] * c + [*score])
            return cls(
                *(ids, counted(-1, n - 1), _kinds(c, n), counted(0, n)),
                score=scores, _n_context=c, _chain=True,
            )  # fmt: skip
        rows = range(len(tokens))
        return cls.build(context, tokens, range(-1, len(tokens) - 1), qrow=rows, q=q, score=score)

    @classmethod
    def grown(
        cls,
        context: Sequence[int],
        tokens: Sequence[int] | np.ndarray,
        parents: Sequence[int] | np.ndarray,
        levels: Sequence[int] | np.ndarray,
        score: Sequence[float] | np.ndarray | None = None,
    ) -> TokenTree:
        """`build` for drafters that know each token's level [n] (1 = child of the tip): a tree of
        any size costs a few microseconds."""
        # Between two forwards this runs cold: lists cost less than slices of arrays, then.
        c, m, ids, above = len(context), len(tokens), as_list(tokens), as_list(parents)
        told = None if score is None else as_list(score)
        if above == [*range(-1, m - 1)]:
            return cls.chain(context, ids, score=told)
        parent = np.array([*range(-1, c - 1), *(p + c for p in above)], np.int64)
        depth = np.array([*range(c), *(d + c - 1 for d in as_list(levels))], np.int64)
        nodes, kinds = np.array([*context, *ids], np.int64), _kinds(c, c + m)
        scores = None if told is None else np.array([1.0] * c + told)
        return cls(nodes, parent, kinds, depth, score=scores, _n_context=c)

    def __len__(self) -> int:
        return len(self.tokens)

    def head(self, n: int) -> TokenTree:
        """The first n nodes of a tree without q rows; parents come first, so that none is lost."""
        score = None if self.score is None else self.score[:n]
        return TokenTree(
            self.tokens[:n], self.parent[:n], self.kind[:n], self.depth[:n], score=score,
            embeds=self.embeds, _n_context=min(n, self.n_context), _chain=self._chain or None,
        )  # fmt: skip

    @property
    def n_context(self) -> int:
        if self._n_context < 0:
            self._n_context = self.kind.tolist().count(0)
        return self._n_context

    @property
    def tip(self) -> int:
        """The last CONTEXT node: drafts hang off it and its row predicts the next token."""
        return self.n_context - 1

    @property
    def drafted(self) -> int:
        """How many nodes a verifier may accept or must reject."""
        kinds = self.kind.tolist()  # a few dozen numbers: lists are quicker than arrays
        return kinds.count(1) + kinds.count(2)

    @property
    def is_chain(self) -> bool:
        known = self._chain
        if known is None:
            known = self._chain = self.parent.tolist() == list(range(-1, len(self) - 1))
        return known

    @property
    def live(self) -> np.ndarray:
        """[n] node indices that the forward computes, in order (all but DEAD)."""
        if self._live is None:
            dead = int(Kind.DEAD)
            some = dead in self.kind.tolist()
            self._live = np.flatnonzero(self.kind != dead) if some else counted(0, len(self))
        return self._live

    def decisions(self) -> list[int]:
        """The tip and every CANDIDATE: the nodes at which a verifier may need the target's row."""
        nodes = np.flatnonzero(self.kind == int(Kind.CANDIDATE)).tolist()
        return [self.tip, *nodes]

    def children(self, node: int) -> list[int]:
        """CANDIDATE and DEAD children of `node` in draw order."""
        if self._children is None:
            kinds, parents, rider = self.kind.tolist(), self.parent.tolist(), int(Kind.RIDER)
            table: list[list[int]] = [[] for _ in kinds]
            for i in range(self.n_context, len(kinds)):
                if kinds[i] != rider:
                    table[parents[i]].append(i)
            self._children = table
        return self._children[node]

    def path(self, node: int) -> list[int]:
        """Drafted nodes from below the tip down to `node` (empty for a CONTEXT node)."""
        nodes = []
        while node >= 0 and self.kind[node] != Kind.CONTEXT:
            nodes.append(int(node))
            node = int(self.parent[node])
        return nodes[::-1]

    def path_tokens(self, node: int) -> list[int]:
        """Token ids along `path(node)`."""
        return self.tokens[self.path(node)].tolist() if node >= 0 else []

    def level(self, node: int) -> int:
        """Drafted depth of `node`: 0 at the tip, 1 for its children."""
        return int(self.depth[node] - self.depth[self.tip])

    def kill(self, illegal: np.ndarray) -> None:
        """Mark drafted nodes where `illegal` [N] is true, and all below them, as DEAD. Riders are
        never emitted, so that nothing forbids them."""
        for i in range(self.n_context, len(self)):
            forbidden = illegal[i] and self.kind[i] != Kind.RIDER
            if forbidden or self.kind[self.parent[i]] == Kind.DEAD:
                self.kind[i] = Kind.DEAD
        self._live = None

    def ancestors(self) -> np.ndarray:
        """[N, N] bool; entry (i, j) is true iff j is i or an ancestor of i."""
        n, rows = len(self), []
        for node, above in enumerate(self.parent.tolist()):
            row = rows[above][:] if above >= 0 else bytearray(n)
            row[node] = 1
            rows.append(row)
        return np.frombuffer(bytearray().join(rows), bool).reshape(n, n)

    def validate(self, vocab: int) -> None:
        """Raise ValueError when an invariant is broken (used by tests and in debug mode)."""
        n, c = len(self), int((self.kind == Kind.CONTEXT).sum())
        if c < 1 or (self.kind[:c] != Kind.CONTEXT).any():
            raise ValueError("a tree starts with at least one CONTEXT node and keeps them first")
        if (self.parent >= np.arange(n)).any() or (self.parent[1:] < 0).any():
            raise ValueError("parents come before their children")
        if n > 1 and (self.depth[1:] != self.depth[self.parent[1:]] + 1).any():
            raise ValueError("a child is one deeper than its parent")
        if ((self.tokens < 0) | (self.tokens >= vocab)).any():
            raise ValueError("a token lies outside the vocabulary")
        for i in range(c, n):
            if self.parent[i] < c - 1 and self.kind[i] != Kind.RIDER:
                raise ValueError("drafts hang off the tip")


_COUNTED = np.arange(-1, 4096, dtype=np.int64)
_COUNTED.flags.writeable = False


def counted(start: int, stop: int) -> np.ndarray:
    """[stop - start] int64 from start >= -1 on, to be read only: trees share them."""
    if stop < len(_COUNTED):
        return _COUNTED[start + 1 : stop + 1]
    return np.arange(start, stop, dtype=np.int64)


def _kinds(c: int, n: int) -> np.ndarray:
    """[n] of a tree with c CONTEXT nodes and CANDIDATE ones behind them."""
    kinds = np.zeros(n, np.int8)
    kinds[c:] = 1
    return kinds


def as_list(a: Sequence[Any] | np.ndarray) -> list[Any]:
    """A list of one's own."""
    return a.tolist() if isinstance(a, np.ndarray) else [*a]
