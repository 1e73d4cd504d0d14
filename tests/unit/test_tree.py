"""TokenTree: structure, kinds, ancestors, and the rows it becomes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretell.core.batch import PackedBatch, segment_of
from foretell.core.tree import Kind, TokenTree

VOCAB = 50


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    context = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4))
    n = draw(st.integers(0, 12))
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=n, max_size=n))
    parents = [draw(st.integers(-1, i - 1)) for i in range(n)]
    tree = TokenTree.build(context, tokens, parents)
    illegal = np.array(draw(st.lists(st.booleans(), min_size=len(tree), max_size=len(tree))))
    if draw(st.booleans()):
        tree.kill(illegal & (draw(st.integers(0, 2)) == 0))
    return tree


@given(trees())
def test_every_tree_keeps_the_invariants(tree: TokenTree) -> None:
    tree.validate(VOCAB)
    n, c = len(tree), tree.n_context
    assert tree.tip == c - 1
    assert tree.drafted == n - c
    assert tree.level(tree.tip) == 0
    for node in range(n):
        path = tree.path(node)
        assert len(path) == max(0, tree.level(node))
        assert path == sorted(path)
        assert tree.path_tokens(node) == tree.tokens[path].tolist()
        if path:
            assert path[-1] == node
            assert tree.parent[path[0]] == tree.tip
            assert (tree.parent[path[1:]] == path[:-1]).all()
    children = [c for node in range(n) for c in tree.children(node)]
    assert sorted(children) == list(range(c, n))
    assert tree.decisions()[0] == tree.tip
    assert set(tree.decisions()[1:]) == set(np.flatnonzero(tree.kind == Kind.CANDIDATE))


@given(trees())
def test_ancestors_are_the_transitive_closure(tree: TokenTree) -> None:
    table = tree.ancestors()
    for node in range(len(tree)):
        above, at = set(), node
        while at >= 0:
            above.add(at)
            at = int(tree.parent[at])
        assert set(np.flatnonzero(table[node])) == above
        assert table[node].sum() == tree.depth[node] + 1


@given(trees())
def test_dead_nodes_take_their_subtree_along(tree: TokenTree) -> None:
    for node in range(tree.n_context, len(tree)):
        if tree.kind[tree.parent[node]] == Kind.DEAD:
            assert tree.kind[node] == Kind.DEAD
    assert (tree.kind[tree.live] != Kind.DEAD).all()
    assert len(tree.live) == (tree.kind != Kind.DEAD).sum()


@given(trees(), st.integers(0, 100))
def test_a_segment_holds_the_live_rows(tree: TokenTree, start: int) -> None:
    live = tree.live
    wanted = list(range(tree.tip, len(tree)))
    segment = segment_of(tree, start, wanted)
    assert segment.tokens.tolist() == tree.tokens[live].tolist()
    assert segment.positions.tolist() == (start + tree.depth[live]).tolist()
    assert live[segment.logits].tolist() == [n for n in wanted if tree.kind[n] != Kind.DEAD]
    if segment.ancestors is None:
        assert (tree.parent[live[1:]] == live[:-1]).all()
    else:
        assert (segment.ancestors == tree.ancestors()[np.ix_(live, live)]).all()
    assert segment_of(tree, start, None).logits is None
    assert len(segment_of(tree, start, ()).logits) == 0


@given(st.lists(trees(), min_size=1, max_size=4))
def test_a_packed_batch_knows_where_rows_are(many: list[TokenTree]) -> None:
    batch = PackedBatch([segment_of(t, 0, range(t.tip, len(t))) for t in many])
    assert batch.rows == sum(len(t.live) for t in many) == batch.offsets[-1]
    rows = batch.logit_rows()
    assert len(rows) == batch.logit_offsets[-1]
    tokens = np.concatenate([s.tokens for s in batch.segments])
    want = [x for t in many for x in t.tokens[[n for n in t.live if n >= t.tip]]]
    assert tokens[rows].tolist() == want
    assert PackedBatch([segment_of(t, 0, None) for t in many]).logit_rows() is None


def test_chain_and_context() -> None:
    chain = TokenTree.chain([5, 6], [7, 8], q=torch.eye(10)[[7, 8]])
    assert chain.is_chain
    assert chain.qrow.tolist() == [-1, -1, 0, 1]
    assert chain.depth.tolist() == [0, 1, 2, 3]
    assert TokenTree.context([1]).is_chain
    assert TokenTree.context([1, 2, 3]).decisions() == [2]
    assert not TokenTree.build([1], [2, 3], [-1, -1]).is_chain


def test_chains_share_what_never_changes_and_nothing_else() -> None:
    first, second = TokenTree.chain([1], [2, 3]), TokenTree.chain([1], [2, 3], score=[0.5, 0.4])
    for shared in (first.parent, first.depth, first.live):
        with pytest.raises(ValueError, match="read-only"):
            shared[1] = 0
    first.kill(first.tokens == 2)
    assert first.kind.tolist() == [Kind.CONTEXT, Kind.DEAD, Kind.DEAD]
    assert second.kind.tolist() == [Kind.CONTEXT, Kind.CANDIDATE, Kind.CANDIDATE]
    assert second.score.tolist() == [1.0, 0.5, 0.4]
    long = TokenTree.context(range(5000))
    assert long.depth.tolist() == list(range(5000))
    assert long.parent.tolist() == list(range(-1, 4999))


def test_siblings_keep_draw_order() -> None:
    tree = TokenTree.build([1], [9, 3, 7, 4], [-1, -1, 0, -1])
    assert [tree.tokens[c] for c in tree.children(tree.tip)] == [9, 3, 4]


def test_riders_are_computed_but_never_verified() -> None:
    tree = TokenTree.build([1], [2, 3], [-1, 0], kind=Kind.RIDER)
    assert tree.drafted == 0
    assert tree.children(tree.tip) == []
    assert tree.decisions() == [0]
    assert len(tree.live) == 3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.parent.__setitem__(2, 3), "before"),
        (lambda t: t.depth.__setitem__(2, 5), "deeper"),
        (lambda t: t.tokens.__setitem__(1, VOCAB), "vocabulary"),
        (lambda t: t.tokens.__setitem__(1, -1), "vocabulary"),
        (lambda t: t.kind.__setitem__(0, Kind.CANDIDATE), "CONTEXT"),
        (lambda t: (t.parent.__setitem__(3, 0), t.depth.__setitem__(3, 1)), "tip"),
    ],
)
def test_validate_finds_broken_trees(change, match: str) -> None:
    tree = TokenTree.build([1, 2], [3, 4], [-1, 0])
    tree.validate(VOCAB)
    change(tree)
    with pytest.raises(ValueError, match=match):
        tree.validate(VOCAB)


@given(trees(), st.booleans())
def test_growing_is_building(tree: TokenTree, scored: bool) -> None:
    """`grown` makes of lists or arrays the tree that `build` makes."""
    c = tree.n_context
    context, tokens = tree.tokens[:c].tolist(), tree.tokens[c:].tolist()
    parents, levels = tree.parent[c:] - c, tree.depth[c:] - (c - 1)
    scores = np.linspace(1.0, 0.5, len(tokens)).tolist() if scored else None
    want = TokenTree.build(context, tokens, parents.tolist(), score=scores)
    for got in (
        TokenTree.grown(context, tree.tokens[c:], parents, levels, scores),
        TokenTree.grown(context, tokens, parents.tolist(), levels.tolist(), scores),
    ):
        for name in ("tokens", "parent", "kind", "depth"):
            a, b = getattr(got, name), getattr(want, name)
            assert a.dtype == b.dtype
            assert (a == b).all()
        assert got.n_context == c
        assert got.is_chain == want.is_chain
        assert (got.score is None) == (want.score is None)
        assert got.score is None or (got.score == want.score).all()
