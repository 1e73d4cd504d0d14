"""Where a sequence ends and what text it has said, token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell import SamplingParams
from foretell.control.finish import Finish, first_stop, overlap
from foretell.models.text.stream import StreamDecoder
from helpers_model import Letters

PIECES = ["a", "b", "ab", "ba", "c", "abc", "", " ", "cab", "</s>"]
EOS = 9


def finish(room: int = 100, text: bool = True, **params) -> Finish:
    decoder = StreamDecoder(Letters(PIECES)) if text else None
    return Finish(SamplingParams(**params), frozenset({EOS}), room, decoder)


def take(f: Finish, tokens: list[int], sizes: list[int]) -> list[str]:
    """Feed tokens in runs of the given sizes, as steps would emit them."""
    texts, at = [], 0
    for size in [*sizes, len(tokens)]:
        texts += f.take(tokens[at : at + size])
        at += size
    return texts


def obvious(tokens: list[int], p: SamplingParams, room: int) -> tuple[int, str | None, str]:
    """(tokens kept, reason, text), by looking at the whole text after every token."""
    ends = set(p.stop_token_ids) | (set() if p.ignore_eos else {EOS})
    text, free = "", ""  # free: said before stop strings counted, and not open any more
    for n, t in enumerate(tokens, 1):
        if t in ends and n > p.min_tokens:
            return n, "stop", text
        text += PIECES[t]
        if p.stop and n >= p.min_tokens:
            at, word = first_stop(text[len(free) :], p.stop)
            if word:
                end = at + len(word) if p.include_stop else at
                return n, "stop", free + text[len(free) :][:end]
        if n >= min(p.max_tokens, room):
            return n, "length", text
        if n < p.min_tokens:
            keep = overlap(text[len(free) :], p.stop)
            free = text[: len(text) - keep]
    return len(tokens), None, text


@given(
    st.lists(st.integers(0, EOS), max_size=14),
    st.lists(st.integers(1, 4), max_size=14),
    st.lists(st.sampled_from(["ab", "abc", "c", "bab", "aab", " ", "cc"]), max_size=3),
    st.booleans(),
    st.integers(0, 5),
    st.integers(5, 12),
    st.integers(1, 12),
    st.booleans(),
)
def test_any_run_ends_where_the_obvious_way_says(
    tokens, sizes, stop, include, min_tokens, max_tokens, room, ignore_eos
) -> None:
    params = {
        "stop": stop,
        "include_stop": include,
        "min_tokens": min_tokens,
        "max_tokens": max_tokens,
        "ignore_eos": ignore_eos,
        "stop_token_ids": (7,),
    }
    f = finish(room, **params)
    texts = take(f, tokens, sizes)
    kept, reason, text = obvious(tokens, SamplingParams(**params), room)
    assert len(texts) == kept
    assert f.reason == reason
    assert "".join(texts) == f.text
    assert f.text + (f.held if reason is None else "") == text
    if reason is None:
        assert f.held == "" or any(s.startswith(f.held) for s in stop)
    assert f.take([0, 1]) == [] or reason is None


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_may_span_tokens_and_end_inside_one(include: bool) -> None:
    f = finish(stop=("bc",), include_stop=include)
    texts = f.take([0, 2, 8, 0])  # a ab cab: "aabcab"
    assert texts == ["a", "a", "bc" if include else ""]
    assert f.text == ("aabc" if include else "aa")
    assert f.reason == "stop"


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_clear() -> None:
    f = finish(stop=("abab",))
    assert f.take([0, 1, 0]) == ["", "", ""]
    assert f.held == "aba"
    assert f.take([4]) == ["abac"]
    assert f.take([0]) == [""]
    assert f.take([EOS]) == ["a"], "held text is said when the sequence ends"
    assert f.text == "abaca"


def test_the_end_token_stays_in_the_output_but_not_in_the_text() -> None:
    f = finish()
    assert f.take([0, EOS, 1]) == ["a", ""]
    assert (f.text, f.reason) == ("a", "stop")


def test_min_tokens_delays_every_kind_of_stop() -> None:
    f = finish(min_tokens=3, stop=("a",), stop_token_ids=(7,))
    assert len(f.take([0, EOS, 7, EOS])) == 4
    assert f.reason == "stop"


def test_the_end_wins_over_the_limit() -> None:
    f = finish(max_tokens=2)
    f.take([0, EOS])
    assert f.reason == "stop"
    f = finish(max_tokens=2, stop=("b",))
    f.take([0, 1])
    assert f.reason == "stop"
    f = finish(room=2)
    f.take([0, 1, 1])
    assert (f.reason, f.count) == ("length", 2)


def test_no_tokenizer_no_text() -> None:
    f = finish(text=False, max_tokens=2)
    assert f.take([0, 1]) == ["", ""]


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("abc", ["c", "b"], (1, "b")),
        ("abc", ["x"], (-1, "")),
        ("abab", ["bab", "ab"], (0, "ab")),
        ("abc", ["ab", "abc"], (0, "ab")),
        ("", ["a"], (-1, "")),
    ],
)
def test_the_earliest_stop_string_counts(text: str, stops: list[str], want) -> None:
    assert first_stop(text, stops) == want


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_overlap_is_the_longest_open_stop_string(text: str, stops: list[str]) -> None:
    ends = [text[i:] for i in range(len(text))]
    want = max((len(e) for e in ends for s in stops if s.startswith(e) and e != s), default=0)
    assert overlap(text, stops) == want
