"""Suffix automata and the drafts read off them, against brute force."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell import SamplingParams, kernels
from foretell.core.errors import InputError
from foretell.core.protocols import Budget, Draw, SeqView
from foretell.core.rng import SeqRng
from foretell.drafters.suffix import SEGMENTS, PastOutputs, Suffix
from foretell.drafters.tables.automaton import AnyAutomaton, SuffixAutomaton
from foretell.drafters.tables.speculate import Limits, best_draft
from foretell.kernels.automaton import Automaton
from helpers_memory import allocated

FULL = Budget(1 << 30, 1 << 30)
texts = st.lists(st.integers(0, 2), max_size=40)


@pytest.fixture(scope="module", params=["compiled", "python"], autouse=True)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything holds for both."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setenv("FORETELL_KERNELS", "off")
        elif kernels.load() is None:
            pytest.skip(kernels.why_not() or "no kernels")
        yield request.param


def new(depth: int, reach: int = 256) -> AnyAutomaton:
    library = kernels.load()
    return Automaton(library, depth, reach) if library else SuffixAutomaton(depth, reach)


def numbers(automaton: AnyAutomaton, state: int) -> tuple[int, int, int]:
    """Length, link, count."""
    if isinstance(automaton, SuffixAutomaton):
        return automaton.length[state], automaton.link[state], automaton.count[state]
    return automaton.state(state)


def view_of(tokens: list[int], prompt_len: int, draw: Draw = Draw.TOP) -> SeqView:
    params = SamplingParams(temperature=0.0 if draw is Draw.TOP else 1.0)
    return SeqView(tokens, prompt_len, params, SeqRng(1), draw, len(tokens) - 1)


def drafted(tree) -> list[int]:
    return tree.tokens[tree.n_context :].tolist()


def occurrences(texts: list[list[int]], part: list[int]) -> int:
    n = len(part)
    return sum(t[i : i + n] == part for t in texts for i in range(len(t) - n + 1))


def walk(automaton: AnyAutomaton, tokens: list[int]) -> int:
    state, matched = automaton.follow((0, 0), tokens)
    return state if matched == len(tokens) else -1


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.integers(2, 6), st.integers(1, 9))
def test_counts_are_those_of_brute_force(documents, depth, more) -> None:
    """Every substring of up to `depth` tokens, in several documents, short reach or long."""
    automaton = new(depth, 2 * depth + more)
    for d in documents:
        automaton.begin()
        automaton.extend(d)
    parts = {tuple(d[i : i + n]) for d in documents for n in range(1, depth + 1) for i in range(40)}
    parts |= {(2, 2, 1), (0, 1, 0, 2)[:depth], (1,)}
    for part in parts:
        want = occurrences(documents, list(part)) if part else 0
        if part:
            state = walk(automaton, list(part))
            assert (state > 0) == (want > 0)
            assert state < 0 or numbers(automaton, state)[2] == want
    assert max(numbers(automaton, s)[0] for s in range(len(automaton))) <= automaton.reach + 1


@settings(max_examples=150, deadline=None)
@given(texts, texts, st.integers(0, 30))
def test_places_are_the_longest_matching_suffixes(document, query, cut) -> None:
    """Also when the automaton grows between two looks."""
    automaton, place = new(50), (0, 0)
    cut = min(cut, len(document))
    automaton.extend(document[:cut])
    half = len(query) // 2
    place = automaton.follow(place, query[:half])
    known = document[:cut]
    matched = max(
        m for m in range(half + 1) if occurrences([known], query[half - m : half]) or not m
    )
    assert place[1] == matched
    automaton.extend(document[cut:])
    for i in range(half, len(query)):
        place = automaton.follow(place, [query[i]])
        matched += 1
        while matched and not occurrences([document], query[i + 1 - matched : i + 1]):
            matched -= 1
        assert place[1] == matched
        assert walk(automaton, query[i + 1 - matched : i + 1]) == place[0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_the_repeated_suffix(text) -> None:
    automaton = new(50)
    automaton.extend(text)
    want = max(m for m in range(len(text) + 1) if not m or occurrences([text], text[-m:]) > 1)
    state, matched = automaton.repeated()
    assert matched == want
    assert walk(automaton, text[len(text) - want :]) == state


def reference_chain(text: list[int], limits: Limits) -> list[int]:
    """The same rule on lists: per matched suffix the likeliest continuation, then the best."""
    best, score = [], 0.0
    longest = max(m for m in range(len(text) + 1) if not m or occurrences([text], text[-m:]) > 1)
    seen = set()
    for m in range(longest, 0, -1):
        key = occurrences([text], text[-m:])
        if key in seen:  # the same class as a longer match
            continue
        seen.add(key)
        most = min(limits.nodes, int(limits.factor * m + limits.offset))
        if min(most, limits.depth) <= score:
            break
        context, prob, tokens, total = text[-m:], 1.0, [], 0.0
        for _ in range(min(most, limits.depth)):
            while context:
                nexts = [occurrences([text], [*context, t]) for t in range(4)]
                if any(nexts):
                    break
                context = context[1:]
            if not context or not any(nexts):
                break
            prob *= max(nexts) / sum(nexts)
            if prob < limits.min_prob:
                break
            first = [t for t in range(4) if nexts[t] == max(nexts)]
            if len(first) > 1:  # of equally frequent ones the one seen first
                at = {t: _find(text, [*context, t]) for t in first}
                first.sort(key=at.__getitem__)
            tokens.append(first[0])
            total += prob
            context = [*context, first[0]]
        if total > score + 1e-12:
            best, score = tokens, total
    return best


def _find(text: list[int], part: list[int]) -> int:
    n = len(part)
    return next(i for i in range(len(text) - n + 1) if text[i : i + n] == part)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=24),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.3]),
    st.integers(1, 9),
)
def test_drafts_are_the_most_frequent_continuations(text, factor, min_prob, depth) -> None:
    automaton = new(50)
    automaton.extend(text)
    limits = Limits(8, depth, 1, factor, 1.0, min_prob)
    found = best_draft(automaton, automaton.repeated(), limits)
    want = reference_chain(text, limits)
    assert len(found.tokens) == len(want)
    assert found.tokens == want
    assert found.score == pytest.approx(sum(found.probs))


def test_more_frequent_beats_more_recent_and_longer_beats_shorter() -> None:
    text = [1, 2, 5, 1, 2, 5, 1, 2, 6, 9, 1, 2]
    drafter = Suffix(tokens=1)
    view = view_of(text, len(text))
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    assert drafted(tree) == [5]
    text = [7, 1, 2, 6, 8, 3, 1, 2, 5, 4, 1, 2, 5, 9, 7, 1, 2]
    view = view_of(text, len(text))
    drafter = Suffix(tokens=3)
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    assert drafted(tree) == [6, 8, 3], "three tokens match only at the beginning"


def test_periodic_text_goes_on() -> None:
    text = [1, 2, 3] * 3
    drafter = Suffix(tokens=8)
    view = view_of(text, 9)
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    assert drafted(tree) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_trees_hold_the_likeliest_nodes() -> None:
    """Counts after 1: 2 twice, 3 and 4 once."""
    text = [1, 2, 5, 1, 2, 5, 1, 3, 6, 1, 4, 7, 1]
    view = view_of(text, len(text))
    for branching, nodes, want in (
        (3, 9, {(2,), (2, 5), (2, 5, 1), (3,), (3, 6), (3, 6, 1), (4,), (4, 7), (4, 7, 1)}),
        (2, 4, {(2,), (2, 5), (2, 5, 1), (3,)}),
        (1, 9, {(2,), (2, 5), (2, 5, 1)}),
    ):
        drafter = Suffix(tokens=3, branching=branching, factor=0, offset=9, min_prob=0.25)
        drafter.limits.nodes = nodes
        (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
        tree.validate(10)
        paths = {tuple(tree.path_tokens(n)) for n in range(tree.n_context, len(tree))}
        assert paths == want
        scores = dict(
            zip(map(tuple, map(tree.path_tokens, range(len(tree)))), tree.score, strict=True)
        )
        assert scores[2,] == pytest.approx(0.5 / 2), "of a match of one token"
        assert scores[2, 5] == pytest.approx(2 / 3), "of one of two"


def test_budgets_are_kept() -> None:
    r = random.Random(0)
    text = [r.randrange(3) for _ in range(200)]
    view = view_of(text, 200)
    for branching in (1, 3):
        drafter = Suffix(tokens=12, branching=branching, factor=4, min_prob=0.01)
        state = drafter.begin(view)
        for nodes in range(8):
            for depth in range(5):
                for width in (1, 2, 9):
                    (tree,) = drafter.propose([state], [view], [Budget(nodes, depth, width)])
                    tree.validate(3)
                    assert tree.drafted <= nodes
                    assert max(tree.level(n) for n in range(len(tree))) <= depth
                    kids = [[tree.tokens[c] for c in tree.children(n)] for n in range(len(tree))]
                    assert max(map(len, kids)) <= min(width, branching)
                    assert all(len(set(k)) == len(k) for k in kids)
                    assert tree.drafted > 0 or not nodes or not depth


def test_a_stop_rule_sees_conditional_scores_and_keeps_the_token() -> None:
    text = [1, 2, 5, 1, 2, 5, 1, 3, 6, 1]
    view = view_of(text, len(text))
    drafter = Suffix(tokens=3, branching=2, factor=0, offset=9, min_prob=0.0)
    drafter.limits.nodes = 9
    seen = []

    def stop(scores):
        seen.append(list(scores))
        return scores[-1] < 0.3

    (tree,) = drafter.propose([drafter.begin(view)], [view], [Budget(99, 99, 9, stop)])
    paths = {tuple(tree.path_tokens(n)) for n in range(tree.n_context, len(tree))}
    assert (3,) in paths
    assert (3, 6) not in paths
    assert (2, 5) in paths
    assert [pytest.approx(2 / 3 / 2)] in seen
    assert any(path == [pytest.approx(1 / 3), pytest.approx(2 / 3)] for path in seen)


def answer(drafter: Suffix, prompt: list[int], output: list[int], draw: Draw = Draw.TOP) -> None:
    view = view_of(list(prompt), len(prompt), draw)
    state = drafter.begin(view)
    view.tokens += output
    drafter.propose([state], [view], [FULL])
    drafter.end(state)


def test_past_outputs_are_remembered_and_prompts_are_not() -> None:
    drafter = Suffix(tokens=4)
    answer(drafter, [9, 9, 8, 7], [1, 2, 3, 4, 5, 6])
    view = view_of([0, 0, 2, 3], 4)
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    assert drafted(tree) == [4, 5, 6]
    view = view_of([0, 9, 8], 3)
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    assert drafted(tree) == []


def test_what_is_shared_depends_on_the_rule() -> None:
    for share, wrote, reads, want in (
        ("exact", Draw.TOP, Draw.NOISE, [4, 5]),
        ("exact", Draw.SAMPLE, Draw.TOP, []),
        ("exact", Draw.TOP, Draw.SAMPLE, []),
        ("always", Draw.SAMPLE, Draw.SAMPLE, [4, 5]),
        ("never", Draw.TOP, Draw.TOP, []),
    ):
        drafter = Suffix(share=share)
        answer(drafter, [9], [1, 2, 3, 4, 5], wrote)
        view = view_of([0, 2, 3], 3, reads)
        (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
        assert drafted(tree) == want, (share, wrote, reads)


def test_the_better_scored_of_request_and_past_wins() -> None:
    drafter = Suffix(tokens=4)
    for _ in range(3):
        answer(drafter, [9], [5, 1, 2, 3, 4, 5, 6])
    view = view_of([1, 2, 7, 8, 0, 5, 1, 2], 8)  # here 7 followed a match of two
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    assert drafted(tree) in ([7, 8, 0, 5], [3, 4, 5, 6])
    view = view_of([1, 2, 7, 1, 2, 8, 0, 5, 1, 2], 10)
    (tree,) = drafter.propose([drafter.begin(view)], [view], [FULL])
    assert drafted(tree) == [3, 4, 5, 6]


def test_places_in_the_past_survive_other_requests() -> None:
    """Outputs that finish between two steps of a request split the states it stands on."""
    r = random.Random(3)
    drafter = Suffix(tokens=6, bytes=1 << 16, depth=8)
    text = [r.randrange(4) for _ in range(5)]
    view = view_of(text, 2)
    state = drafter.begin(view)
    for _ in range(60):
        answer(drafter, [1], [r.randrange(4) for _ in range(30)])
        (tree,) = drafter.propose([state], [view], [FULL])
        fresh = view_of(list(text), 2)
        (same,) = drafter.propose([drafter.begin(fresh)], [fresh], [FULL])
        assert drafted(tree) == drafted(same)
        text += [r.randrange(4) for _ in range(r.randint(1, 3))]


def test_state_stays_within_its_bytes_over_10_000_requests() -> None:
    r = random.Random(0)
    limit = 1 << 17
    drafter = Suffix(bytes=limit, depth=8)
    assert drafter.past is not None
    evicted = 0
    for request in range(10_000):
        drafter.past.add([r.randrange(50) for _ in range(r.randint(1, 12))])
        assert drafter.state_bytes() <= limit
        evicted = drafter.past.made - len(drafter.past.segments)
        if request % 1000 == 0:
            answer(drafter, [1, 2], [r.randrange(50) for _ in range(9)])
    assert evicted > 10
    assert drafter.state_bytes() > limit / 3, "memory is used, not merely kept small"


def test_declared_bytes_are_real_bytes(kind: str) -> None:
    r = random.Random(0)
    words = [[r.randrange(200) for _ in range(r.randint(2, 6))] for _ in range(150)]
    documents = [[t for _ in range(40) for t in r.choice(words)] for _ in range(12)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] if kind == "python" else allocated()
    past = PastOutputs(3 << 20, 32)
    for d in documents:
        past.add(d)
    after = tracemalloc.get_traced_memory()[0] if kind == "python" else allocated()
    real = after - before
    tracemalloc.stop()
    assert len(past.segments) >= 1
    assert 0.6 * real < past.nbytes < 2 * real
    assert real <= past.limit


def test_one_output_larger_than_everything() -> None:
    r = random.Random(0)
    past = PastOutputs(1 << 16, 8)
    past.add([r.randrange(1000) for _ in range(5000)])
    assert past.nbytes <= past.limit
    assert 1 < len(past.segments) <= SEGMENTS + 1


def test_a_text_of_one_token_costs_little() -> None:
    automaton = new(8, 16)
    automaton.extend([1] * 500)
    chain, s = 0, automaton.follow((0, 0), [1] * 500)[0]
    while s > 0:
        chain, s = chain + 1, numbers(automaton, s)[1]
    assert 8 <= chain <= 17
    assert numbers(automaton, walk(automaton, [1] * 8))[2] == 493


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 0},
        {"branching": 0},
        {"factor": 0.2, "offset": 0.5},
        {"factor": float("inf")},
        {"offset": float("nan")},
        {"min_prob": 1.5},
        {"bytes": 10},
        {"share": "maybe"},
        {"depth": 1},
    ],
)
def test_bad_options_are_refused(options) -> None:
    with pytest.raises(InputError, match="suffix"):
        Suffix(**options)


def test_state_of_no_past_is_nothing() -> None:
    drafter = Suffix(bytes=0)
    answer(drafter, [9], [1, 2, 3, 4])
    assert drafter.state_bytes() == 0
    assert np.isfinite(drafter.limits.factor)
