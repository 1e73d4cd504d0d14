"""The compiled automaton is the one in Python: states, places, drafts to the last bit."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Sequence
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.drafters.tables.automaton import SuffixAutomaton, automata
from foretell.drafters.tables.speculate import Limits, best_draft
from foretell.kernels.automaton import Automaton, Place
from foretell.kernels.library import Library
from helpers_memory import allocated

HIGH = (1 << 31) - 1


def pairs(made: SuffixAutomaton, found: Automaton) -> None:
    """Every state, and what leads on from it."""
    assert len(made) == len(found)
    for s in range(len(made)):
        assert found.state(s) == (made.length[s], made.link[s], made.count[s])
        nexts = {made.first[s]: made.to[s], **made.more.get(s, {})}
        nexts.pop(-1, None)
        for token, to in nexts.items():
            at = made.length[s]
            assert found.follow((s, at), [token]) == made.follow((s, at), [token]) == (to, at + 1)


def same_drafts(
    made: SuffixAutomaton, found: Automaton, place: Place, limits: Limits, floor: float
) -> int:
    want = best_draft(made, place, limits, floor)
    assert astuple(best_draft(found, place, limits, floor)) == astuple(want), (place, limits)
    return len(want.tokens)


@st.composite
def documents(draw: st.DrawFn) -> list[list[int]]:
    """Texts of few tokens or many, with beginnings that come back and one token many times."""
    token = st.sampled_from(
        draw(st.sampled_from([(5,), (0, 1), (0, 7, HIGH), tuple(range(100)), (3, 1 << 30, 9, 8)]))
    )
    part = st.lists(token, min_size=1, max_size=12)
    parts = draw(st.lists(part, min_size=1, max_size=4))
    return [
        [t for p in draw(st.lists(st.sampled_from(parts), max_size=12)) for t in p]
        + [draw(token)] * draw(st.sampled_from([0, 1, 60]))
        for _ in range(draw(st.integers(1, 4)))
    ]


LIMITS = st.builds(
    Limits,
    nodes=st.sampled_from([0, 1, 4, 16, 70]),
    depth=st.sampled_from([0, 1, 4, 16, 70]),
    branching=st.sampled_from([1, 1, 2, 3, 50]),
    factor=st.sampled_from([0.0, 0.3, 1.0, 4.0, 1e9]),
    offset=st.sampled_from([-3.0, 0.0, 0.7, 1.0, 9.0]),
    min_prob=st.sampled_from([0.0, 0.1, 0.34, 1.0]),
)


@settings(max_examples=250, deadline=None)
@given(
    documents(),
    st.integers(2, 12),
    st.integers(0, 60),
    st.lists(LIMITS, min_size=3, max_size=3),
    st.sampled_from([0.0, 0.0, 1.0, 2.5]),
    st.randoms(use_true_random=False),
)
def test_it_is_the_same_automaton(lib, texts, depth, more, limits, floor, dice) -> None:
    """Also read in pieces, with a place that follows another text, after every piece."""
    made = SuffixAutomaton(depth, 2 * depth + more)
    found = Automaton(lib, depth, 2 * depth + more)
    assert (made.depth, made.reach) == (found.depth, found.reach)
    place = (0, 0)
    for text in texts:
        made.begin()
        found.begin()
        cut = dice.randint(0, len(text))
        for piece in (text[:cut], text[cut:]):
            made.extend(piece)
            found.extend(piece)
            other = dice.choice(texts)
            read = other[dice.randint(0, len(other)) :][: dice.randint(0, 9)]
            assert found.follow(place, read) == made.follow(place, read)
            place = made.follow(place, read)
            assert found.repeated() == made.repeated()
            for lim in limits:
                same_drafts(made, found, made.repeated(), lim, floor)
                same_drafts(made, found, place, lim, floor)
    pairs(made, found)


def long_text(tokens: int, count: int, seed: int = 0) -> list[int]:
    """Words in a random order, more and less frequent ones."""
    r = random.Random(seed)
    words = [[r.randrange(tokens) for _ in range(r.randint(1, 8))] for _ in range(count // 8)]
    text: list[int] = []
    while len(text) < count:
        text += words[int(len(words) * r.random() ** 3)]
    return text[:count]


@pytest.mark.parametrize("tokens", [2, 40, 5000])
def test_long_texts_on_every_instruction_set(libraries: list[Library], tokens: int) -> None:
    """States of thousands of successors, and states that are split with many."""
    text = long_text(tokens, 6000, tokens)
    made, found = SuffixAutomaton(16, 64), [Automaton(lib, 16, 64) for lib in libraries]
    drafted = 0
    for at in range(0, len(text), 100):
        made.extend(text[at : at + 100])
        for one in found:
            one.extend(text[at : at + 100])
            for branching in (1, 4, 1000):
                limits = Limits(24, 24, branching, min_prob=0.02)
                drafted += same_drafts(made, one, made.repeated(), limits, 0.0)
    for one in found:
        pairs(made, one)
        assert one.nbytes <= made.nbytes
    assert drafted > 1000
    assert tokens > 40 or max(map(len, made.more.values())) < 40
    assert tokens < 5000 or len(made.more[0]) > 1000


def test_it_takes_less_memory_for_every_kind_of_text(lib: Library) -> None:
    """Also of what states leave behind that outgrow their blocks."""
    for text, most in (
        ([*range(3000)], 80),
        (long_text(30, 3000), 56),
        ([i * i % 1009 for i in range(3000)], 39),
        ([*range(3000), *long_text(3000, 3000)], 63),
    ):
        made, found = SuffixAutomaton(), Automaton(lib)
        made.extend(text)
        found.extend(text)
        assert found.nbytes < min(made.nbytes, most * len(text))
    assert Automaton(lib).nbytes < 1024


def test_any_int32_is_a_token_and_nothing_else(lib: Library) -> None:
    automaton, text = Automaton(lib), [HIGH, 0, -HIGH - 1, -1, HIGH, 0]
    automaton.extend(text)
    assert automaton.follow((0, 0), text)[1] == 6
    assert automaton.repeated()[1] == 2
    found = best_draft(automaton, automaton.repeated(), Limits(2, 2))
    assert found.tokens == [-HIGH - 1, -1]
    for wrong in (1 << 31, -(1 << 31) - 1, 1 << 80):
        with pytest.raises(OverflowError):
            automaton.extend([1, wrong])
    with pytest.raises(TypeError):
        automaton.extend([1.5])  # type: ignore[list-item]
    assert automaton.repeated()[1] == 2, "what is refused is not read"
    assert Automaton(lib, 1 << 70).depth == 1 << 70


def test_places_of_other_automata_are_refused(lib: Library) -> None:
    automaton = Automaton(lib)
    automaton.extend([1, 2, 1])
    for state in (-1, len(automaton), 1 << 40):
        with pytest.raises(IndexError):
            automaton.follow((state, 1), [1])
        with pytest.raises(IndexError):
            automaton.state(state)
    with pytest.raises(IndexError):
        best_draft(automaton, (len(automaton), 1), Limits(4, 4))


def test_it_is_not_copied(lib: Library) -> None:
    """Two objects would free the same memory."""
    automaton = Automaton(lib)
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copied"):
            way(automaton)


def until_full(automaton: Automaton, text: Sequence[int]) -> int:
    for i, token in enumerate(text):
        try:
            automaton.extend([token])
        except MemoryError:
            return i
    return len(text)


def test_memory_may_end_anywhere(lib: Library) -> None:
    """It knows what it has read, says so again when asked for more, and never holds more."""
    r = random.Random(1)
    text = [*r.choices(range(3), k=60), *range(100), *r.choices(range(50), k=90)]
    with pytest.raises(MemoryError):
        Automaton(lib, limit=100)
    limit, ends = Automaton(lib).nbytes, set()
    while True:
        found, made = Automaton(lib, limit=limit), SuffixAutomaton()
        n = until_full(found, text)
        made.extend(text[:n])
        pairs(made, found)
        same_drafts(made, found, made.repeated(), Limits(8, 8, 3), 0.0)
        assert found.nbytes <= limit
        if n == len(text):
            break
        with pytest.raises(MemoryError):
            found.extend([text[n]])
        pairs(made, found)
        ends.add(n)
        limit += 40
    assert len(ends) > 40


def test_memory_may_end_where_the_end_is_entered_again(lib: Library) -> None:
    r = random.Random(2)
    text = [r.randrange(3) for _ in range(400)]
    limit, ends = Automaton(lib).nbytes, set()
    while True:
        found = Automaton(lib, 4, 8, limit)
        n = until_full(found, text)
        for part in ([a, b, c] for a in range(3) for b in range(3) for c in range(3)):
            state, matched = found.follow((0, 0), part)
            want = sum(text[i : i + 3] == part for i in range(n - 2))
            assert (found.state(state)[2] if matched == 3 else 0) == want
        made = SuffixAutomaton(4, 8)
        made.extend(text[:n])
        assert found.repeated()[1] == made.repeated()[1]
        if n == len(text):
            break
        found.begin()
        found.follow((0, 0), text)
        ends.add(n)
        limit += 40
    assert len(ends) > 20


def test_nothing_leaks(lib: Library) -> None:
    text, before = long_text(500, 2000), 0
    for i in range(40):
        if i == 2:  # by now everybody else has what they keep
            before = allocated()
        automaton = Automaton(lib)
        automaton.extend(text)
        assert automaton.nbytes > 40_000
        for branching in (1, 3):
            best_draft(automaton, automaton.repeated(), Limits(16, 16, branching))
        del automaton
    assert allocated() - before < 20_000


def test_threads_have_automata_of_their_own(lib: Library) -> None:
    results: list[list[int]] = [[] for _ in range(4)]

    def work(i: int) -> None:
        text = long_text(50 + i, 3000, i)
        automaton = Automaton(lib)
        for at in range(0, len(text), 10):
            automaton.extend(text[at : at + 10])
            results[i] += best_draft(automaton, automaton.repeated(), Limits(16, 16)).tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    together = results
    results = [[] for _ in range(4)]
    for i in range(4):
        work(i)
    assert results == together
    assert all(results)


def test_which_one_is_made(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(automata(8)(), Automaton)
    monkeypatch.setenv("FORETELL_KERNELS", "off")
    assert isinstance(automata(8)(), SuffixAutomaton)
