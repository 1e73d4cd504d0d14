"""The compiled suffix automaton as a Python object."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foretell.kernels.library import Library

Place = tuple[int, int]  # a state, and how many tokens before it match
Drafted = tuple[list[int], list[int], list[int], list[float], float, int]

_LOW = (1 << 32) - 1
NO_STATE = -2
_FULL = "There is no memory for a suffix automaton over more text."


class Automaton:
    """What `drafters.tables.automaton.SuffixAutomaton` is, compiled: the same states under the same
    numbers, and the same drafts to the last bit.

    Token ids are those of int32; others raise OverflowError. limit: bytes it may hold, 0 = as many
    as there are. Without memory `extend` raises MemoryError: what it has read until then it knows,
    the rest it does not, and it goes on from there. One thread at a time.
    """

    __slots__ = ("_calls", "_handle", "depth", "reach")

    def __init__(self, library: Library, depth: int = 32, reach: int = 256, limit: int = 0) -> None:
        self._handle: int | None = None
        self._calls = library.cdll
        self.depth, self.reach = depth, max(reach, 2 * depth)
        longest = (1 << 31) - 1  # no text is
        self._handle = self._calls.ft_automaton_create(
            min(depth, longest), min(self.reach, longest), limit
        )
        if self._handle is None:
            raise MemoryError(_FULL)

    def __del__(self) -> None:
        if self._handle is not None:
            self._calls.ft_automaton_destroy(self._handle)
            self._handle = None

    def __reduce__(self) -> str:
        raise TypeError("A compiled automaton is neither copied nor pickled: read the text again.")

    def __len__(self) -> int:
        return self._calls.ft_automaton_state(self._handle, 0, (ctypes.c_int32 * 3)())

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        return self._calls.ft_automaton_bytes(self._handle)

    def begin(self) -> None:
        """A new document: nothing before it is its context."""
        self._calls.ft_automaton_begin(self._handle)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the document."""
        ids = array("i", tokens)
        if self._calls.ft_automaton_extend(self._handle, *ids.buffer_info()) < len(ids):
            raise MemoryError(_FULL)

    def state(self, state: int) -> tuple[int, int, int]:
        """Length, link and count of a state."""
        numbers = (ctypes.c_int32 * 3)()
        _check(self._calls.ft_automaton_state(self._handle, state, numbers))
        length, link, count = numbers
        return length, link, count

    def follow(self, place: Place, tokens: Iterable[int]) -> Place:
        """Move a place on: the longest suffix of what was read before, then `tokens`, that occurs
        here. Places stay valid while the automaton grows."""
        ids = array("i", tokens)
        found = _check(self._calls.ft_automaton_follow(self._handle, *place, *ids.buffer_info()))
        return found >> 32, found & _LOW

    def repeated(self) -> Place:
        """The longest suffix of the document that occurs twice or more."""
        found = self._calls.ft_automaton_repeated(self._handle)
        return found >> 32, found & _LOW

    def draft(
        self,
        place: Place,
        nodes: int,
        depth: int,
        branching: int,
        factor: float,
        offset: float,
        min_prob: float,
        floor: float,
    ) -> Drafted | None:
        """What `drafters.tables.speculate.best_draft` finds: tokens, parents, levels, probs, score
        and matched; None = nothing."""
        most = min(nodes, int(factor * place[1] + offset))
        if branching == 1:
            most = min(most, depth)
        if most <= floor or place[0] <= 0:
            return None
        out, probs = array("q", bytes(24 * most)), array("d", bytes(8 * most + 16))
        n = self._calls.ft_automaton_draft(
            *(self._handle, *place, most, depth, branching, factor, offset, min_prob, floor),
            *(out.buffer_info()[0], probs.buffer_info()[0]),
        )
        if n <= 0:
            _check(n)
            return None
        return (
            out[:n].tolist(),
            out[most : most + n].tolist(),
            out[2 * most : 2 * most + n].tolist(),
            probs[:n].tolist(),
            probs[most],
            int(probs[most + 1]),
        )


def _check(found: int) -> int:
    if found >= 0:
        return found
    if found == NO_STATE:
        raise IndexError("An automaton has no such state.")
    raise MemoryError("There is no memory for a draft.")
