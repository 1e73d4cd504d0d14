"""Composed drafts keep the target's law: every draw of every part, and every flip, is enumerated.

The compositions run unchanged over parts that draft from tables.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from foretell.core.params import SamplingParams
from foretell.core.protocols import Budget, Draw, Needs, Promise, SeqView
from foretell.core.registry import create
from foretell.core.tree import Kind, TokenTree
from foretell.drafters import compose, fallback, graft
from foretell.drafters.fallback import Fallback
from foretell.drafters.graft import Graft
from foretell.drafters.merge import Merge
from foretell.drafters.rasd import Rasd
from foretell.verify.rejection import Rejection
from helpers_drafts import eagerly, iid, masked, sampled, table
from helpers_exact import Branch, Child, Prefix, Table, deviation

EXACT = 1e-12
Procedure = Callable[[Branch, Prefix], TokenTree]


@pytest.fixture(autouse=True)
def _draws_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part's own noise is its own branch."""
    monkeypatch.setattr(compose, "DrafterRng", lambda rng, part: rng)


class Part:
    """A drafter that is a draft procedure."""

    name = "part"
    promise = Promise.EXACT
    paper = ""
    needs = Needs()

    def __init__(self, procedure: Procedure, shapes: str = "tree q") -> None:
        self.procedure, self.shapes = procedure, frozenset(shapes.split())

    def begin(self, view: SeqView) -> None:
        return None

    def propose(self, states: Any, views: Any, budgets: Any) -> list[TokenTree]:
        trees = [self.procedure(v.rng.branch, tuple(v.tokens[1:])) for v in views]
        assert all(t.drafted <= b.nodes for t, b in zip(trees, budgets, strict=True))
        return trees


def view_of(branch: Branch, text: Prefix, how: Draw = Draw.SAMPLE) -> SeqView:
    rng: Any = SimpleNamespace(branch=branch)
    return SeqView([0, *text], 1, SamplingParams(temperature=1.0), rng, how, len(text))


def drafting(drafter: Any, how: Draw = Draw.SAMPLE, nodes: int = 99) -> Procedure:
    def draft(branch: Branch, text: Prefix) -> TokenTree:
        view = view_of(branch, text, how)
        (tree,) = drafter.propose([drafter.begin(view)], [view], [Budget(nodes, 99)])
        tree.validate(3)
        return tree

    return draft


def found(offset: int, widths: tuple[int, ...]) -> Procedure:
    """A retrieved tree: one-hot, the same after the same text."""

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        if level >= len(widths):
            return []
        first = sum(prefix) + offset
        return [((first + j) % 3, None, Kind.CANDIDATE) for j in range(widths[level])]

    return eagerly(grow)


def drawn(seed: object, *widths: int) -> Procedure:
    return eagerly(sampled(table(seed, 3), widths))


PAIRS: dict[str, list[Procedure]] = {
    "chain+found": [drawn("q", 1, 1), found(0, (2, 1))],
    "found+chain": [found(0, (2, 1)), drawn("q", 1, 1)],
    "siblings+found": [drawn("q", 2), found(1, (2, 2))],
    "found+siblings": [found(1, (2, 2)), drawn("q", 2)],
    "siblings+siblings": [drawn("q", 2), drawn("r", 2)],
    "chain+chain": [drawn("q", 1, 1), drawn("r", 1, 1)],
    "tree+tree": [drawn("q", 2, 1), drawn("r", 1, 1)],
    "one+one": [drawn("q", 1), drawn("r", 1)],
    "found+one": [found(0, (1,)), drawn("q", 1)],
    "same q": [drawn("q", 2), drawn("q", 2)],
    "three": [drawn("q", 1), found(2, (1, 1)), drawn("r", 1, 1)],
}


def merged(parts: list[Procedure]) -> Procedure:
    return drafting(Merge([Part(p) for p in parts]))


@pytest.mark.parametrize("name", PAIRS)
def test_merged_trees_keep_the_law_under_rejection(name: str) -> None:
    for seed, kind in enumerate(("dense", "zeros")):
        p = table(("p", seed), 3, kind)
        assert deviation(Rejection(), merged(PAIRS[name]), p, 3) < EXACT, kind


def test_a_merge_within_a_merge_keeps_the_law() -> None:
    inner = Merge([Part(drawn("q", 1)), Part(found(0, (2,)))])
    for parts in ([inner, Part(drawn("r", 2))], [Part(drawn("r", 1, 1)), inner]):
        p = table("p", 3)
        assert deviation(Rejection(), drafting(Merge(parts)), p, 3) < EXACT


def test_independent_siblings_of_two_drafters_under_specinfer() -> None:
    parts = [eagerly(iid(table(s, 3), [2])) for s in ("q", "r")]
    rule = create("verifier", "specinfer")
    p = table("p", 3)
    assert deviation(rule, drafting(Merge([Part(x) for x in parts]), Draw.IID), p, 2) < EXACT


@pytest.mark.parametrize("name", ["siblings+found", "found+siblings", "siblings+siblings"])
def test_merged_trees_under_a_constraint(name: str) -> None:
    p = masked(table("p", 3), "m", 3)
    whole = merged(PAIRS[name])

    def killed(branch: Branch, text: Prefix) -> TokenTree:
        tree = whole(branch, text)
        illegal = np.zeros(len(tree), bool)
        for i in range(tree.n_context, len(tree)):
            above = tree.path_tokens(int(tree.parent[i]))
            illegal[i] = float(p((*text, *above))[tree.tokens[i]]) == 0
        tree.kill(illegal)
        return tree

    assert deviation(Rejection(), killed, p, 3) < EXACT


def without_repeats(tree: TokenTree) -> TokenTree:
    """What a merge must not do: forget draws that another drafter made too."""
    keep = [i for i in range(tree.n_context, len(tree)) if tree.kind[i] != Kind.DEAD]
    place = {n: i for i, n in enumerate(keep)} | {tree.tip: -1}
    assert tree.qrow is not None
    return TokenTree.build(
        tree.tokens[: tree.n_context].tolist(),
        tree.tokens[keep].tolist(),
        [place[int(tree.parent[n])] for n in keep],
        qrow=tree.qrow[keep].tolist(),
        q=tree.q,
    )


@pytest.mark.parametrize("name", ["found+one", "one+one", "found+chain"])
def test_forgetting_a_repeated_draw_is_biased(name: str) -> None:
    whole = merged(PAIRS[name])
    off = [
        deviation(Rejection(), lambda b, t: without_repeats(whole(b, t)), table(("p", s), 3), 3)
        for s in range(3)
    ]
    assert max(off) > 0.005


def test_two_drafters_with_the_same_noise_are_biased() -> None:
    def draft(branch: Branch, text: Prefix) -> TokenTree:
        first = drawn("q", 1)(branch, text)
        return compose.fuse(first, first, 99)

    assert deviation(Rejection(), draft, table("p", 3), 3) > 0.01


def doubtful(q: Table) -> Procedure:
    """A chain that goes on below a likely token only: how long it is depends on what was drawn."""

    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        if level == 2 or (level == 1 and q(prefix[:-1])[prefix[-1]] < 0.4):
            return []
        return sampled(q, (1, 1))(branch, prefix, level)

    return eagerly(grow)


@pytest.mark.parametrize("first", ["drawn", "found"])
def test_falling_through_never_looks_at_what_was_drawn(monkeypatch, first: str) -> None:
    q, p = table("q", 3), table("p", 3)
    parts = [Part(doubtful(q)), Part(found(1, (1, 1, 1)))]
    if first == "found":
        parts = [Part(found(1, (1,))), Part(doubtful(q))]
    whole = drafting(Fallback(parts, least=2))
    assert deviation(Rejection(), whole, p, 3) < EXACT
    monkeypatch.setattr(fallback, "has_rows", lambda tree: False)  # as if any draft may be dropped
    assert deviation(Rejection(), whole, p, 3) > 0.005


def test_every_node_keeps_the_row_it_was_drawn_from() -> None:
    """The q rows of two drafters come in one tensor."""
    branch = Branch([])
    first, second = PAIRS["siblings+siblings"][0](branch, ()), drawn("r", 2)(branch, ())
    tree = compose.fuse(first, second, 9)
    assert tree.q is not None
    assert tree.qrow is not None
    rows = [tree.q[r] for r in tree.qrow[1:].tolist()]
    for row, name in zip(rows, "qqrr", strict=True):
        assert torch.equal(row, table(name, 3)(()))


class Lookup(Part):
    """A retrieving part: one-hot, and it looks behind paths."""

    def __init__(self, offset: int, widths: tuple[int, ...]) -> None:
        super().__init__(found(offset, widths), "tree onehot")

    def propose(self, states: Any, views: Any, budgets: Any) -> list[TokenTree]:
        trees = [self.procedure(v.rng.branch, tuple(v.tokens[1:])) for v in views]
        return [
            compose.fuse(TokenTree.context(v.pending), t, b.nodes)
            for v, t, b in zip(views, trees, budgets, strict=True)
        ]

    def after(self, state: Any, view: SeqView, path: list[int], budget: Budget) -> TokenTree:
        tree = self.procedure(view.rng.branch, (*view.tokens[1:], *path))  # type: ignore[arg-type]
        return compose.fuse(TokenTree.context([0]), tree, budget.nodes)


class Scored(Part):
    """A drawing part that gives each token's q as its score, and asks for its distributions."""

    def __init__(self, q: Any, *widths: int) -> None:
        super().__init__(eagerly(sampled(q, widths)))
        self.table = q

    def propose(self, states: Any, views: Any, budgets: Any) -> list[TokenTree]:
        trees = super().propose(states, views, budgets)
        for view, tree in zip(views, trees, strict=True):
            view.warp(self.table(tuple(view.tokens[1:]))[None], [[]])
            assert tree.q is not None
            assert tree.qrow is not None
            rows = zip(tree.qrow.tolist(), tree.tokens.tolist(), strict=True)
            tree.score = np.array([1.0 if r < 0 else float(tree.q[r][x]) for r, x in rows])
        return trees


@pytest.mark.parametrize("widths", [(1,), (2,), (1, 1)])
def test_retrieved_trees_pruned_by_the_draft_model_keep_the_law(widths: tuple[int, ...]) -> None:
    for keep in (0, 1, 2):
        drafter = Rasd([Scored(table("q", 3), *widths), Lookup(1, (2, 1))], nodes=5, keep=keep)
        assert deviation(Rejection(), drafting(drafter), table("p", 3), 3) < EXACT, keep


@pytest.mark.parametrize("widths", [(1,), (2,), (1, 1)])
def test_grafted_trees_keep_the_law_and_pruning_draws_would_not(
    monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...]
) -> None:
    p = table("p", 3)
    for nodes in (3, 6):
        drafter = Graft([Scored(table("q", 3), *widths), Lookup(1, (1, 1))], nodes, prune=0.4)
        assert deviation(Rejection(), drafting(drafter), p, 3) < EXACT, nodes
    monkeypatch.setattr(graft, "has_rows", lambda tree: False)  # as if draws might be pruned
    drafter = Graft([Scored(table("q", 3), *widths), Lookup(1, (1, 1))], 6, prune=0.4)
    assert deviation(Rejection(), drafting(drafter), p, 3) > 0.005
