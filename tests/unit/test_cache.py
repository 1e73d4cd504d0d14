"""After any accepts, rejects, rollbacks, truncations: logits equal those of a fresh prefill."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretell.core.batch import PackedBatch, Segment, segment_of
from foretell.core.tree import TokenTree
from foretell.models.cache.contiguous import ContiguousCache, ContiguousTxn
from foretell.models.native.arch import Arch, LayerArch
from foretell.models.native.runner import NativeModel

VOCAB = 37
PLAIN = Arch.llama(VOCAB, 24, 2, 6, 2, 20, theta=50.0)
WINDOWS = replace(PLAIN, layers=(LayerArch(0, 4), LayerArch(None), LayerArch(0, 7)), attn_cap=1.5)
MODELS = [NativeModel.random(a, torch.float64, seed=i) for i, a in enumerate((PLAIN, WINDOWS))]


def fresh(model: NativeModel, ids: list[int]) -> torch.Tensor:
    with model.open([model.new_cache()]) as txn:
        return model.forward(PackedBatch([chain(ids)]), txn).logits


def chain(ids: list[int], start: int = 0) -> Segment:
    return Segment(np.asarray(ids, np.int64), np.arange(start, start + len(ids)))


def agree(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    which=st.integers(0, 1),
    ops=st.lists(
        st.sampled_from(["tree", "tree", "chain", "roll", "cut", "error", "twice", "copy"]),
        min_size=3,
        max_size=12,
    ),
    seed=st.integers(0, 10**6),
)
def test_any_history_equals_a_fresh_prefill(which: int, ops: list[str], seed: int) -> None:
    model, r = MODELS[which], random.Random(seed)
    texts: list[list[int]] = [[], []]
    caches = [model.new_cache(r.choice([0, 3])) for _ in texts]

    def tokens(n: int) -> list[int]:
        return [r.randrange(VOCAB) for _ in range(n)]

    def step(op: str) -> None:
        trees = []
        for _ in texts:
            nodes = 0 if op == "chain" else r.randrange(0, 9)
            parents = [r.randrange(-1, i) for i in range(nodes)]
            trees.append(TokenTree.build(tokens(r.randrange(1, 6)), tokens(nodes), parents))
        segments = [segment_of(t, len(x), None) for t, x in zip(trees, texts, strict=True)]
        batch = PackedBatch(segments)
        with model.open(caches) as txn:
            logits = model.forward(batch, txn).logits
            paths = []
            for b, tree in enumerate(trees):
                leaf = r.randrange(tree.n_context - 1, len(tree))
                path = [*range(tree.n_context), *tree.path(leaf)]
                paths.append(path)
                rows = [batch.offsets[b] + node for node in path]
                text = texts[b] + tree.tokens[path].tolist()
                agree(logits[rows], fresh(model, text)[len(texts[b]) :])
            if op == "roll":
                return
            if op == "error":
                raise KeyError("somebody failed")
            txn.commit(paths)
        for b, path in enumerate(paths):
            texts[b] += trees[b].tokens[path].tolist()

    def twice() -> None:
        """Two forwards in one transaction: a chain, then two branches that see parts of it."""
        first = [tokens(3) for _ in texts]
        with model.open(caches) as txn:
            starts = [len(t) for t in texts]
            model.forward(
                PackedBatch([chain(f, s) for f, s in zip(first, starts, strict=True)]), txn
            )
            late = tokens(2)
            seen = np.array([[1, 0, 0, 1, 0], [1, 1, 0, 0, 1]], bool)
            branches = [Segment(np.asarray(late), np.array([s + 1, s + 2]), seen) for s in starts]
            logits = model.forward(PackedBatch(branches), txn).logits
            for b, f in enumerate(first):
                agree(logits[2 * b], fresh(model, [*texts[b], f[0], late[0]])[-1])
                agree(logits[2 * b + 1], fresh(model, [*texts[b], *f[:2], late[1]])[-1])
            txn.commit([[0, 3], [0, 1, 4]])
        texts[0] += [first[0][0], late[0]]
        texts[1] += [*first[1][:2], late[1]]

    for op in ops:
        if op == "cut":
            for text, cache in zip(texts, caches, strict=True):
                n = r.randrange(len(text) + 1)
                cache.truncate(n)
                del text[n:]
        elif op == "copy":
            n = r.randrange(len(texts[0]) + 1)
            caches[1].truncate(0)
            caches[1].copy_prefix(caches[0], n)
            texts[1] = texts[0][:n]
        elif op == "twice":
            twice()
        elif op == "error":
            with pytest.raises(KeyError):
                step(op)
        else:
            step(op)
        for text, cache in zip(texts, caches, strict=True):
            cache.check()
            assert cache.n == len(text)
            assert cache.positions[: cache.n].tolist() == list(range(cache.n))
    step("chain")


def test_layers_one_by_one_equal_the_forward() -> None:
    for model in MODELS:
        ids = [3, 1, 4, 1, 5, 9, 2, 6]
        whole = fresh(model, ids)
        cache, batch = model.new_cache(), PackedBatch([chain(ids)])
        with model.open([cache]) as txn:
            x = model.embed(torch.tensor(ids))
            for layer in range(model.spec.layers):
                x = model.run_layers(x, batch, txn, [layer])
            txn.advance(batch)
            agree(model.unembed(x), whole)
            txn.commit([range(len(ids))])
        cache.check()


def test_taps_are_what_the_layers_read() -> None:
    model = MODELS[0]
    batch = PackedBatch([chain([3, 1, 4])])
    batch.segments[0].logits = np.array([2])
    with model.open([model.new_cache()]) as txn:
        out = model.forward(batch, txn, taps=("embed", 0, 1, 2, "last"))
    assert out.logits.shape == (1, VOCAB)
    agree(out.hidden["embed"], out.hidden[0])
    agree(out.hidden["embed"], model.embed(torch.tensor([3, 1, 4])))
    agree(model.unembed(out.hidden[2])[2:], out.logits)
    agree((out.hidden["last"] @ model.head).float()[2:], out.logits)


def test_growth_copies_a_linear_number_of_rows() -> None:
    cache = MODELS[0].new_cache()
    sizes = []
    for rows in range(1, 5000):
        cache.ensure(rows)
        sizes.append(cache.capacity)
    assert len(set(sizes)) < 15
    assert cache.capacity < 2 * 5000


def test_reserve_keeps_rows_of_an_open_transaction() -> None:
    model = MODELS[0]
    cache = model.new_cache(4)
    with model.open([cache]) as txn:
        model.forward(PackedBatch([chain([1, 2, 3, 4])]), txn)
        cache.reserve(300)
        txn.commit([range(4)])
    with model.open([cache]) as txn:
        logits = model.forward(PackedBatch([chain([5], 4)]), txn).logits
    agree(logits, fresh(model, [1, 2, 3, 4, 5])[-1:])


def test_misuse_is_refused_and_changes_nothing() -> None:
    model = MODELS[0]
    cache = model.new_cache()
    with pytest.raises(RuntimeError, match="twice"):
        model.open([cache, cache])
    with model.open([cache]) as txn:
        model.forward(PackedBatch([chain([1, 2, 3])]), txn)
        for path in ([2, 1], [0, 3], [-1], [1, 1]):
            with pytest.raises(ValueError, match="increasing"):
                txn.commit([path])
        with pytest.raises(ValueError, match="one path"):
            txn.commit([])
        with pytest.raises(RuntimeError, match="open transaction"):
            model.open([cache])
        with pytest.raises(RuntimeError, match="open transaction"):
            cache.truncate(0)
        txn.commit([[0, 2]])
        with pytest.raises(RuntimeError, match="closed"):
            txn.commit([[0]])
    assert cache.n == 2
    for n in (-1, 3):
        with pytest.raises(ValueError, match="truncate"):
            cache.truncate(n)
    with torch.inference_mode():
        cache.kv[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="finite"):
        cache.check()


def with_rows(n: int) -> ContiguousCache:
    """A cache of n rows, in as much memory as they need."""
    cache = ContiguousCache((1, 1, 2), torch.float32, torch.device("cpu"), n)
    with ContiguousTxn([cache]) as txn:
        with torch.inference_mode():
            cache.kv[:, :n] = torch.arange(n)[None, :, None, None, None]
        txn.advance(PackedBatch([chain([0] * n)]))
        txn.commit([range(n)])
    return cache


def test_growth_makes_the_room_that_is_asked_for_and_no_more_than_half_again() -> None:
    cache = with_rows(5)
    for rows in (6, 64, 65, 97, 98, 1000, 1001):
        had = cache.capacity
        cache.ensure(rows)
        assert rows <= cache.capacity <= max(rows, had, had * 3 // 2, 64)
        assert cache.kv[0, :5, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_copy_makes_room_for_itself_and_needs_an_empty_cache_and_rows_that_exist() -> None:
    source, copy = with_rows(100), ContiguousCache((1, 1, 2), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="rows that exist"):
        copy.copy_prefix(source, 101)
    with ContiguousTxn([copy]), pytest.raises(RuntimeError, match="open transaction"):
        copy.copy_prefix(source, 3)
    copy.copy_prefix(source, 90)
    copy.check()
    assert (copy.n, copy.kv[0, :90, 0, 0, 0].tolist()) == (90, list(range(90)))
    with pytest.raises(ValueError, match="empty cache"):
        copy.copy_prefix(source, 95)
    assert copy.n == 90


def test_check_finds_what_is_broken() -> None:
    cache = with_rows(4)
    cache.check()
    txn = ContiguousTxn([cache])
    with pytest.raises(AssertionError, match="transaction is open"):
        cache.check()
    txn.__exit__()
    for name, value, match in (
        ("used", 3, "scratch rows"),
        ("n", 5, "more rows than room"),
        ("positions", np.array([0, 2, 1, 3]), "do not increase"),
        ("positions", np.array([0, 1, 1, 3]), "do not increase"),
        ("positions", np.arange(5), "differ in number"),
    ):
        right = getattr(cache, name)
        setattr(cache, name, value)
        with pytest.raises(AssertionError, match=match):
            cache.check()
        setattr(cache, name, right)
    cache.check()
