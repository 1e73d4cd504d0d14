"""Datastores: suffix order, the file, what is found in it, the drafter, and the command."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell import LLM, InputError, SamplingParams
from foretell.cli.main import main
from foretell.core.protocols import Budget, BuildContext, Draw, SeqView
from foretell.core.rng import SeqRng
from foretell.drafters.retrieval import Retrieval
from foretell.drafters.tables.datastore.prefixes import heaviest_prefixes
from foretell.drafters.tables.datastore.reader import Datastore
from foretell.drafters.tables.datastore.suffixes import suffix_order
from foretell.drafters.tables.datastore.writer import StoreWriter
from helpers_model import TableModel

FULL = Budget(1 << 30, 1 << 30)
VOCAB = 5


def store_of(path: Path, *shards: list[list[int]], vocab: int = VOCAB, **facts) -> Datastore:
    with path.open("wb") as f:
        writer = StoreWriter(f, vocab, facts)
        for documents in shards:
            writer.add(np.array([t for d in documents for t in (*d, vocab)], np.uint32))
        writer.finish()
    return Datastore(path)


def view_of(tokens: list[int]) -> SeqView:
    return SeqView(tokens, len(tokens), SamplingParams(), SeqRng(1), Draw.TOP, len(tokens) - 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=80), st.sampled_from([1, 2, 4, 32]))
def test_suffixes_are_sorted_by_their_first_tokens(text, length) -> None:
    order = suffix_order(np.array(text, np.uint16), length).tolist()
    assert sorted(order) == list(range(len(text)))
    heads = [text[i : i + length] for i in order]
    assert heads == sorted(heads)


def test_a_text_of_one_token_and_a_long_one() -> None:
    assert suffix_order(np.zeros(100, np.uint16), 128).tolist() == list(range(99, -1, -1))
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50, 20_000).astype(np.uint16)
    order = suffix_order(text, 32)
    packed = text.astype(">u2").tobytes()
    want = sorted(range(len(text)), key=lambda i: packed[2 * i : 2 * i + 64])
    assert order.tolist() == want


def brute(rows: list[list[int]], vocab: int) -> dict[tuple[int, ...], int]:
    counts: dict[tuple[int, ...], int] = {}
    for row in rows:
        for n in range(1, len(row) + 1):
            if row[n - 1] >= vocab:
                break
            counts[tuple(row[:n])] = counts.get(tuple(row[:n]), 0) + 1
    return counts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=30),
    st.integers(1, 12),
    st.sampled_from([1, 2, 99]),
)
def test_the_tree_is_the_heaviest_prefixes(rows, nodes, branching) -> None:
    """Token 3 ends a document."""
    counts = brute(rows, 3)
    tokens, parents, levels, scores = heaviest_prefixes(np.array(rows), nodes, 3, branching)
    paths: list[tuple[int, ...]] = []
    for t, p, level, score in zip(tokens, parents, levels, scores, strict=True):
        path = (*(paths[p] if p >= 0 else ()), int(t))
        assert len(path) == level
        paths.append(path)
        above = counts[path[:-1]] if path[:-1] else len(rows)
        assert score == pytest.approx(counts[path] / above)
    assert len(set(paths)) == len(paths) <= nodes
    for parent in {path[:-1] for path in paths}:
        mine = [counts[p] for p in paths if p[:-1] == parent]
        assert len(mine) <= branching
        assert mine == sorted(mine, reverse=True)
        others = sorted((c for p, c in counts.items() if p[:-1] == parent), reverse=True)
        assert mine == others[: len(mine)]
    if branching == 99:
        assert len(paths) == min(nodes, len(counts))
        lightest = min((counts[p] for p in paths), default=0)
        assert all(c <= lightest for p, c in counts.items() if p not in paths)


documents = st.lists(st.lists(st.integers(0, 3), max_size=14), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(documents, documents, st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_matches_are_the_longest_ones_of_any_shard(tmp_path_factory, one, two, query) -> None:
    path = tmp_path_factory.mktemp("store") / "s"
    store = store_of(path, one, two)
    texts = [*one, *two]

    def places(part: list[int]) -> list[list[int]]:
        n = len(part)
        found = [(d, i) for d in texts for i in range(len(d) - n + 1) if d[i : i + n] == part]
        return sorted((d[i + n :] + [VOCAB] * 3)[:3] for d, i in found)

    want = max((n for n in range(2, min(6, len(query)) + 1) if places(query[-n:])), default=0)
    matched, found = store.matches(query, 6, 2)
    assert matched == want
    if want:
        rows = store.continuations(found, matched, 3, 1000)
        cut = [[t if VOCAB not in r[:i] else VOCAB for i, t in enumerate(r)] for r in rows.tolist()]
        assert sorted(cut) == places(query[-want:])


@settings(max_examples=100, deadline=None)
@given(documents, st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_rows_of_one_shard_come_in_order(tmp_path_factory, texts, query) -> None:
    """So equal prefixes are neighbours and no two siblings are the same."""
    store = store_of(tmp_path_factory.mktemp("store") / "s", texts)
    matched, found = store.matches(query, 6, 1)
    if found:
        rows = store.continuations(found, matched, 4, 1000)
        sure = heaviest_prefixes(rows, 20, VOCAB)
        fast = heaviest_prefixes(rows, 20, VOCAB, ordered=True)
        assert (
            dict(zip(map(tuple, _paths(sure)), sure[3], strict=True))
            == dict(zip(map(tuple, _paths(fast)), fast[3], strict=True))
            or len(sure[0]) == 20
        )


def _paths(tree) -> list[list[int]]:
    paths: list[list[int]] = []
    for t, p in zip(tree[0].tolist(), tree[1].tolist(), strict=True):
        paths.append([*(paths[p] if p >= 0 else []), t])
    return paths


def test_places_are_sampled_evenly(tmp_path) -> None:
    store = store_of(tmp_path / "s", [[1, 2, 3]] * 30 + [[1, 2, 4]] * 10)
    matched, found = store.matches([0, 1, 2], 16, 2)
    assert matched == 2
    assert len(store.continuations(found, 2, 1, 1000)) == 40
    rows = store.continuations(found, 2, 1, 10)[:, 0].tolist()
    assert len(rows) == 10
    assert rows.count(3) in (7, 8)


def test_wide_vocabularies(tmp_path) -> None:
    store = store_of(tmp_path / "s", [[70_000, 3, 80_000, 256]], vocab=100_000)
    matched, found = store.matches([70_000, 3], 16, 2)
    assert (matched, store.width) == (2, 4)
    assert store.continuations(found, 2, 2, 9).tolist() == [[80_000, 256]]


def test_the_drafter_drafts_what_followed(tmp_path) -> None:
    store = store_of(tmp_path / "s", [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3], [1, 4, 4]])
    drafter = Retrieval(store, nodes=3)
    (tree,) = drafter.propose([None], [view_of([4, 0, 1])], [FULL])
    tree.validate(VOCAB)
    paths = [tree.path_tokens(n) for n in range(tree.n_context, len(tree))]
    assert paths == [[2], [2, 3], [2, 4]]
    two, three = 2 / 3, 3 / 4  # how far a match of so many tokens is trusted
    assert tree.score[1:].tolist() == pytest.approx([two, three * 2 / 3, three / 3])
    (tree,) = drafter.propose([None], [view_of([4, 0, 1])], [Budget(9, 9, 1)])
    assert tree.is_chain
    assert tree.tokens[1:].tolist() == [2, 3]
    (tree,) = drafter.propose([None], [view_of([2, 2])], [FULL])
    assert tree.drafted == 0
    (tree,) = drafter.propose([None], [view_of([0, 1, VOCAB + 3])], [FULL])
    assert tree.drafted == 0, "an id beyond the store's vocabulary"
    (tree,) = drafter.propose([None], [view_of([0, 1, VOCAB + 3, 0, 1])], [FULL])
    assert tree.drafted == 3
    for nodes in range(5):
        for depth in range(4):
            (tree,) = drafter.propose([None], [view_of([0, 1])], [Budget(nodes, depth)])
            assert tree.drafted <= min(nodes, 3)
            assert max(tree.level(n) for n in range(len(tree))) <= depth
            assert tree.drafted > 0 or not nodes or not depth
    stop = Budget(9, 9, 9, lambda scores: scores[-1] < 2)
    (tree,) = drafter.propose([None], [view_of([0, 1])], [stop])
    assert tree.tokens[1:].tolist() == [2]


def test_retrieval_says_what_plain_decoding_says(tmp_path) -> None:
    target = TableModel()
    text = []
    for seed in range(4):
        params = SamplingParams(max_tokens=100, temperature=0.8 * (seed > 0), seed=seed + 10)
        plain = LLM(target).generate([[1, 1, 2]], params)[0]
        text.append([1, 1, 2, *plain.token_ids])
    store = store_of(tmp_path / "s", text, vocab=11)
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=40, temperature=temperature, seed=1)
        want = LLM(target).generate([[1, 1, 2], [5, 6]], params)
        llm = LLM(target, draft=Retrieval(store))
        got = llm.generate([[1, 1, 2], [5, 6]], params)
        assert [o.token_ids for o in got] == [o.token_ids for o in want]
        assert got[0].stats.acceptance_length > (3 if not temperature else 1.2)


class Named:
    """What `build` looks at of a tokenizer."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint


def test_stores_that_do_not_fit_are_refused(tmp_path) -> None:
    path = tmp_path / "s"
    store_of(path, [[0, 1, 2, 3]], vocab=11, tokenizer="abc")
    target = TableModel()
    build = Retrieval.build
    assert build(BuildContext(target, Named("abc")), str(path)).store.tokens == 5
    with pytest.raises(InputError, match="another tokenizer"):
        build(BuildContext(target, Named("abd")), str(path))
    with pytest.raises(InputError, match="11 token ids but the model only 7"):
        build(BuildContext(TableModel(7)), str(path))
    with pytest.raises(InputError, match="needs a datastore"):
        build(BuildContext(target))
    with pytest.raises(InputError, match="at most 32"):
        build(BuildContext(target), str(path), max_match=30)
    whole = path.read_bytes()
    for broken, message in (
        (b"", "is empty"),
        (b"hello world, this is text", "no datastore"),
        (whole[:200], "broken or incomplete"),
        (whole[:-4], "broken or incomplete"),
        (whole.replace(b'"version": 1', b'"version": 9'), "version 9"),
        (whole[:16] + b"}" + whole[17:], "broken or incomplete"),
    ):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=message):
            Datastore(path)
    with pytest.raises(InputError, match="cannot be read"):
        Datastore(tmp_path / "absent")


LINES = ["def f(x):\n", "    return x + 1\n"]


def run(*words: object) -> int:
    return main(["build-datastore", *map(str, words)])


def test_the_command_builds_what_the_bundled_model_reads(tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES) * 50)
    rows = [{"question": "2 + 2 = ?", "answer": "It is 4."}, {"messages": [{"content": "Hello"}]}]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write("\n".join(map(json.dumps, rows)) + "\n\n")
    out = tmp_path / "store"
    assert run(tmp_path / "a.txt", tmp_path / "b.jsonl.gz", "--out", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["documents"], told["shards"]) == (3, 1)
    store = Datastore(out)
    assert store.tokens == told["tokens"] + 3
    assert store.header["sources"] == ["a.txt", "b.jsonl.gz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.jsonl.gz", "store"]

    from foretell.models.load import bundled_model
    from foretell.models.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(bundled_model())
    assert store.header["tokenizer"] == tokenizer.fingerprint
    prompt = tokenizer.encode("".join(LINES) + "def f", add_special=False)
    matched, found = store.matches(prompt, 16, 2)
    assert matched == 16 or matched == len(prompt)
    rows = store.continuations(found, matched, 8, 100)
    assert tokenizer.decode(rows[0].tolist()).startswith("(x):\n    ret")
    for document in ("2 + 2 = ?\nIt is 4.", "Hello"):
        ids = tokenizer.encode(document, add_special=False)
        matched, found = store.matches(ids, 16, 1)
        assert matched == min(16, len(ids))
        assert (store.continuations(found, matched, 1, 9) == store.vocab).any(), "the document ends"


def test_shards_hold_the_same_text(tmp_path, capsys) -> None:
    text = "".join(f"line {i} of a file, {i * 7919 % 1000}\n" for i in range(700))
    (tmp_path / "a.txt").write_text(text)
    for shard in (10**6, 1000):
        assert run(tmp_path / "a.txt", "--out", tmp_path / f"{shard}", "--shard", shard, "-q") == 0
    one, many = Datastore(tmp_path / "1000000"), Datastore(tmp_path / "1000")
    assert len(one.shards) == 1
    assert len(many.shards) > 3

    def ids(store: Datastore) -> list[int]:
        whole = np.concatenate([s.tokens for s in store.shards]).astype(int)
        return whole[whole < store.vocab].tolist()

    assert ids(one) == ids(many)


def test_bad_input_is_one_sentence(tmp_path, capsys) -> None:
    good, bad, empty = tmp_path / "a.txt", tmp_path / "bad.txt", tmp_path / "empty.txt"
    good.write_text("hello")
    bad.write_bytes(b"ab\xff\xfe")
    empty.write_text("")
    (tmp_path / "x.jsonl").write_text('{"other": 1}\n')
    (tmp_path / "y.jsonl").write_text("{oops\n")
    (tmp_path / "z.txt.gz").write_bytes(b"\x1f\x8b broken")
    out = tmp_path / "store"
    out.write_text("precious")
    for words, message in (
        ([tmp_path / "none.txt", "--out", out], "cannot be read"),
        ([tmp_path, "--out", out], "is a directory"),
        ([bad, "--out", out], "not valid UTF-8"),
        ([empty, "--out", out], "no text"),
        ([tmp_path / "x.jsonl", "--out", out], "has no text"),
        ([tmp_path / "y.jsonl", "--out", out], "is no JSON"),
        ([tmp_path / "z.txt.gz", "--out", out], "cannot be read"),
        ([good, "--out", tmp_path / "no" / "store"], "there is no directory"),
        ([good, "--out", good], "one of the inputs"),
        ([good, "--out", out, "--shard", 5], "too small"),
        ([good, "--out", out, "--model", tmp_path / "absent"], "There is no directory"),
    ):
        assert run(*words) == 2, words
        err = capsys.readouterr().err.strip()
        assert message in err
        assert err.count("\n") == 0
    assert out.read_text() == "precious"
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "a.txt").write_text("hello world " * 100)
    out = tmp_path / "store"
    out.write_text("precious")

    def interrupt(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "finish", interrupt)
    assert run(tmp_path / "a.txt", "--out", out) == 130
    assert out.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "store"]


def test_the_file_is_what_it_says(tmp_path) -> None:
    store = store_of(tmp_path / "s", [[0, 1], [2]], [[3, 3, 3]])
    assert [s["tokens"] for s in store.header["shards"]] == [5, 4]
    assert [s["suffixes"] for s in store.header["shards"]] == [3, 3], "no match begins at an end"
    assert all(s["text"] % 64 == s["order"] % 64 == 0 for s in store.header["shards"])
