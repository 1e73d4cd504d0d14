"""A suffix automaton that counts: all substrings of texts, and how often each occurs."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable
from functools import partial

from foretell import kernels
from foretell.kernels.automaton import Automaton, Place

STATE = 5 * 4  # bytes of a state's numbers
ENTRY = 64  # bytes of the two int objects of a dict entry
GROWTH = 1.13  # arrays hold up to an eighth more than they use


class SuffixAutomaton:
    """Built token by token, amortised O(1) each. Substrings of up to `depth` tokens are exact.

    A state is a class of substrings that end at the same places: ``length`` of the longest one,
    ``link`` to the class of the longest suffix that has more places, ``count`` of the places.
    Following a token t from a state leads to the class of "its strings, then t", whose count says
    how often t came next. Most states have one successor, kept in two arrays; a dict holds more.

    When the text before the end has grown to `reach` tokens, the end is entered once more, with
    `depth` tokens of context and uncounted: no chain of suffixes gets longer than `reach`, even in
    a text that is one token again and again, and strings of up to `depth` tokens lose nothing.
    """

    __slots__ = (
        "count",
        "depth",
        "first",
        "last",
        "length",
        "link",
        "more",
        "overhead",
        "reach",
        "tail",
        "to",
    )

    def __init__(self, depth: int = 32, reach: int = 256) -> None:
        self.depth, self.reach = depth, max(reach, 2 * depth)
        self.length, self.link, self.count = array("i", [0]), array("i", [-1]), array("i", [0])
        self.first, self.to = array("i", [-1]), array("i", [-1])  # the first successor
        self.more: dict[int, dict[int, int]] = {}  # state -> its further successors
        self.last = 0  # the state of the text so far
        self.tail: list[int] = []  # its last tokens
        self.overhead = 0  # bytes of the inner dicts

    def __len__(self) -> int:
        return len(self.length)

    @property
    def nbytes(self) -> int:
        """Memory it holds, estimated from above."""
        return int(GROWTH * STATE * len(self.length)) + self.overhead + sys.getsizeof(self.more)

    # building

    def begin(self) -> None:
        """A new document: nothing before it is its context."""
        self.last, self.tail = 0, []

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the document."""
        length, link, count = self.length, self.link, self.count
        append, reach = self._append, self.reach
        for token in tokens:
            if length[self.last] >= reach:
                self.tail = self.tail[-self.depth :]
                self.last = 0
                for t in self.tail:
                    append(t)
            append(token)
            self.tail.append(token)
            s = self.last
            while s > 0:
                count[s] += 1
                s = link[s]

    def _append(self, token: int) -> None:
        length, link, first, last = self.length, self.link, self.first, self.last
        q = self.step(last, token) if first[last] >= 0 else -1
        if q >= 0:  # at the beginning of a further document, or of the end entered once more
            self.last = q if length[q] == length[last] + 1 else self._split(last, token, q)
            return
        new = self._state(length[last] + 1, 0)
        to, p = self.to, last
        while p >= 0:
            if first[p] < 0:
                first[p], to[p] = token, new
            elif (q := self.step(p, token)) < 0:
                self._add(p, token, new)
            else:
                link[new] = q if length[q] == length[p] + 1 else self._split(p, token, q)
                break
            p = link[p]
        self.last = new

    def _split(self, p: int, token: int, q: int) -> int:
        """Give the strings "one of p's, then token" a state of their own; q keeps longer ones."""
        twin = self._state(self.length[p] + 1, self.link[q])
        self.count[twin] = self.count[q]
        self.first[twin], self.to[twin] = self.first[q], self.to[q]
        if q in self.more:
            self.more[twin] = dict(self.more[q])
            self.overhead += _bytes(self.more[twin])
        self.link[q] = twin
        while p >= 0 and self.step(p, token) == q:
            if self.first[p] == token:
                self.to[p] = twin
            else:
                self.more[p][token] = twin
            p = self.link[p]
        return twin

    def _state(self, length: int, link: int) -> int:
        self.length.append(length)
        self.link.append(link)
        self.count.append(0)
        self.first.append(-1)
        self.to.append(-1)
        return len(self.length) - 1

    def _add(self, p: int, token: int, q: int) -> None:
        """A further successor."""
        more = self.more.get(p)
        if more is None:
            more = self.more[p] = {}
        else:
            self.overhead -= _bytes(more)
        more[token] = q
        self.overhead += _bytes(more)

    # reading

    def step(self, state: int, token: int) -> int:
        """The state after `token`; -1 when it never came next."""
        if self.first[state] == token:
            return self.to[state]
        more = self.more.get(state)
        return -1 if more is None else more.get(token, -1)

    def follow(self, place: Place, tokens: Iterable[int]) -> Place:
        """Move a place on: the longest suffix of what was read before, then `tokens`, that occurs
        here. Places stay valid while the automaton grows."""
        state, matched = place
        while state > 0 and self.length[self.link[state]] >= matched:
            state = self.link[state]  # it has been split since
        for token in tokens:
            after = self.step(state, token)
            while after < 0 and state > 0:
                state = self.link[state]
                matched = self.length[state]
                after = self.step(state, token)
            state, matched = (after, matched + 1) if after >= 0 else (0, 0)
        return state, matched

    def repeated(self) -> Place:
        """The longest suffix of the document that occurs twice or more."""
        s = self.last
        while s > 0 and self.count[s] < 2:
            s = self.link[s]
        return s, self.length[s]


def _bytes(more: dict[int, int]) -> int:
    return sys.getsizeof(more) + ENTRY * len(more)


AnyAutomaton = Automaton | SuffixAutomaton


def automata(depth: int) -> Callable[[], AnyAutomaton]:
    """What makes empty ones: compiled, where there are kernels, for the same drafts in a fraction
    of time and memory."""
    library = kernels.load()
    if library is None:
        return partial(SuffixAutomaton, depth)
    return partial(Automaton, library, depth)
