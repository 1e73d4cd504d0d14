"""Chains that the kernels grow alone: what they are told, asked and answered (kernels/chain.h)."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence

from foretell.core.stop import PathStop

Ends = Callable[[int, float], bool] | Sequence[PathStop]
Draws = Sequence[tuple[float, Sequence[int]]]
_NUMBERS = 12  # of a Chain, before its lists
_ASK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_double)


class Question:
    """Lets the library ask whether a chain ends; one is made for a model, since that takes long."""

    def __init__(self) -> None:
        self.ends: Callable[[int, float], bool] | None = None
        self.failed: BaseException | None = None
        self._function = _ASK(self._ask)
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def _ask(self, b: int, score: float) -> bool:
        try:
            return self.ends is None or self.ends(b, score)
        except BaseException as e:  # between two frames of C nobody would hear of it
            self.failed = e
            return True

    def settle(self) -> None:
        """After the call: forget who answered; raise what went wrong there."""
        failed, self.failed, self.ends = self.failed, None, None
        if failed is not None:
            raise failed


class ChainCall:
    """One call's numbers in one array: a `Chain`, then most [B], made [B], tokens [B, room] and
    probabilities [B, room]. The arguments are those of `core.protocols.Chains`."""

    def __init__(
        self, levels: Sequence[int], question: Question, ends: Ends | None, draws: Draws | None
    ) -> None:
        self.count, self.room, self.asked = len(levels), max(levels), ends is not None
        self.tokens = _NUMBERS + 2 * self.count  # where they begin
        self.scores = self.tokens + self.count * self.room
        m = self.memory = array("Q", [0] * (self.scores + self.count * self.room))
        self.address = at = m.buffer_info()[0]
        m[0], m[1], m[2] = self.room, at + 8 * _NUMBERS, at + 8 * (_NUMBERS + self.count)
        m[3], m[_NUMBERS : _NUMBERS + self.count] = at + 8 * self.tokens, array("Q", levels)
        if ends is not None:
            m[4] = at + 8 * self.scores
        if callable(ends):
            m[5], question.ends = question.address, ends
        elif ends is not None:
            self._tell(ends)
        if draws is not None:
            rest = [0] * self.room
            self.temperatures = array("d", [t for t, _ in draws])
            self.keys = array("Q", [k for _, keys in draws for k in [*keys, *rest][: self.room]])
            m[10], m[11] = self.temperatures.buffer_info()[0], self.keys.buffer_info()[0]

    def _tell(self, stops: Sequence[PathStop]) -> None:
        """Stops of the same edges."""
        edges = stops[0].edges
        self.edges = array("d", [*edges, 0.0])  # an empty array has no address
        self.rates, self.least = array("d"), array("d")
        for stop in stops:
            self.rates.extend(stop.rates or [1.0] * (len(edges) + 1))
            self.least.extend([*stop.least, *[0.0] * self.room][: self.room])
        m = self.memory
        m[6], m[7] = self.edges.buffer_info()[0], len(edges)
        m[8], m[9] = self.rates.buffer_info()[0], self.least.buffer_info()[0]

    def found(self) -> list[tuple[list[int], list[float]]]:
        """Of each sequence the tokens, and their probabilities where somebody was asked."""
        made = self.memory[_NUMBERS + self.count : self.tokens]
        scores = memoryview(self.memory).cast("B").cast("d")
        chains = []
        for i, n in enumerate(made):
            first, said = self.tokens + i * self.room, self.scores + i * self.room
            sure = scores[said : said + n].tolist() if self.asked else []
            chains.append((self.memory[first : first + n].tolist(), sure))
        return chains
