"""Kept rows: what is found, what is given up first, and prompts that grow beside running ones."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from foretell import LLM
from foretell.engine.kept import BLOCK, KeptRows, shared
from helpers_model import TableModel

IDS = st.lists(st.integers(0, 2), max_size=40)


class Rows:
    """Stands for a cache."""

    def __init__(self, n: int) -> None:
        self.n = n


def kept(*texts: list[int]) -> KeptRows:
    store = KeptRows()
    for text in texts:
        store.add(text, Rows(len(text)))  # type: ignore[arg-type]
    return store


@settings(max_examples=300, deadline=None)
@given(st.lists(IDS, max_size=12), IDS, st.integers(0, 40))
def test_the_longest_beginning_is_found(texts: list[list[int]], prompt: list[int], limit) -> None:
    store = kept(*texts)
    limit = min(limit, len(prompt))
    n, entry = store.find(prompt, limit)
    best = max((min(shared(prompt, t), limit) for t in texts), default=0)
    if best < BLOCK:
        assert (n, entry) == (0, None)
    else:
        assert n // BLOCK == best // BLOCK, "no whole block is lost"
        assert entry is not None
        assert entry.tokens[:n] == prompt[:n]
        assert n <= len(entry.tokens)


@given(st.lists(IDS, max_size=20), st.lists(st.integers(0, 19), max_size=20))
def test_rows_are_counted_and_nothing_stays_in_the_table(texts, order) -> None:
    store = kept(*texts)
    assert store.rows == sum(len(k.tokens) for k in store)
    for i in order:
        entries = list(store)
        if i < len(entries):
            store.touch(entries[i])
            assert store[-1] is entries[i]
    while len(store):
        oldest = store[0]
        store.drop_oldest()
        assert oldest not in list(store)
        assert store.rows == sum(len(k.tokens) for k in store)
    assert store._table == {}


def test_of_two_texts_that_continue_one_another_the_longer_is_kept() -> None:
    a = list(range(20))
    store = kept(a, [*a, 1, 2, 3], a[:16], [9, *a])
    assert [len(k.tokens) for k in store] == [23, 21]


def test_texts_that_part_at_the_last_id_are_two() -> None:
    a, b = [*range(19), 5], [*range(19), 6, 7]
    assert [k.tokens for k in kept(a, b)] == [a, b]
    assert [k.tokens for k in kept(b, a)] == [b, a]


def test_a_shorter_text_is_a_use_of_the_longer() -> None:
    a, b = list(range(20)), list(range(50, 70))
    store = kept(a, b, a[:16])
    assert [k.tokens for k in store] == [b, a]
    store.drop_oldest()
    assert store.find(a, 20)[0] == 20


def test_the_least_recently_used_goes_first_and_a_hit_counts_as_use() -> None:
    target = TableModel(max_positions=200)
    llm = LLM(target, kv_rows=100)
    texts = [[i, *range(10), *range(10), i] for i in range(4)]
    for text in texts[:3]:
        llm.generate([text], max_tokens=1)
    scheduler = llm.engine.scheduler
    assert [k.tokens[0] for k in scheduler.kept] == [0, 1, 2]
    out = llm.generate([[*texts[0], 5]], max_tokens=1)[0]
    assert out.stats.reused == 22
    llm.generate([texts[3]], max_tokens=1)
    llm.generate([[7, *range(10), 9, 9, 9]], max_tokens=3)
    left = [k.tokens[0] for k in scheduler.kept]
    assert 0 in left
    assert 1 not in left
    assert scheduler.spare <= 100


def test_many_kept_beginnings_cost_one_lookup() -> None:
    """Not every kept text is compared with the prompt."""
    store = kept(*[[i % 11, i // 11, *range(30)] for i in range(300)])
    compared = []

    class Watched(list):
        def __getitem__(self, key: Any) -> Any:
            compared.append(key)
            return super().__getitem__(key)

    for entry in store:
        entry.tokens = Watched(entry.tokens)
    n, _ = store.find([3, 5, *range(20), 9], 22)
    assert n == 22
    assert len(compared) < 20
