"""The rejection rule's output has exactly the target's law: all random outcomes are enumerated."""

from __future__ import annotations

import pytest
import torch

from foretell.verify.rejection import Rejection
from helpers_drafts import (
    eagerly,
    independent,
    killing,
    lazily,
    masked,
    mixed,
    onehot,
    sampled,
    table,
    withheld,
)
from helpers_exact import Branch, TableRows, deviation, joint, round_law
from helpers_rng import Unlucky

EXACT = 1e-12
SEEDS = range(4)

TABLES = {  # target, draft
    "dense": ("dense", "dense"),
    "target zeros": ("zeros", "dense"),
    "draft zeros": ("dense", "zeros"),
    "both zeros": ("zeros", "zeros"),
    "disjoint": ("even", "odd"),
    "certain target": ("point", "dense"),
    "certain draft": ("dense", "point"),
}
SHAPES = {"chain of 2": [1, 1], "chain of 3": [1, 1, 1], "siblings": [3], "tree 3-2-1": [3, 2, 1]}


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_drafts_keep_the_law(tables: str, shape: str) -> None:
    target, draft = TABLES[tables]
    widths = SHAPES[shape]
    vocab = 5 if len(widths) < 3 else 4 if sum(widths) == 3 else 3
    for seed in SEEDS:
        p, q = table(("p", seed), vocab, target), table(("q", seed), vocab, draft)
        off = deviation(Rejection(), lazily(sampled(q, widths)), p, len(widths) + 1)
        assert off < EXACT, (seed, off)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_draft_that_equals_the_target_is_always_accepted(shape: str) -> None:
    p = table("p", 3)
    widths = SHAPES[shape]
    law = round_law(Rejection(), lazily(sampled(p, widths)), p)
    assert {len(text) for text in law} == {len(widths) + 1}
    assert deviation(Rejection(), lazily(sampled(p, widths)), p, len(widths) + 1) < EXACT


@pytest.mark.parametrize("procedure", [onehot, withheld, independent])
@pytest.mark.parametrize("widths", [[1, 1], [2, 1], [3, 2]])
def test_other_draft_procedures_keep_the_law(procedure, widths: list[int]) -> None:
    for seed in SEEDS:
        for target in ("dense", "zeros"):
            p, q = table(("p", seed), 3, target), table(("q", seed), 3)
            assert deviation(Rejection(), lazily(procedure(q, widths)), p, 3) < EXACT


@pytest.mark.parametrize("sampled_first", [True, False])
def test_retrieved_and_sampled_siblings_mix(sampled_first: bool) -> None:
    for seed in SEEDS:
        p, q = table(("p", seed), 4), table(("q", seed), 4)
        grow = mixed(q, [2, 1], sampled_first)
        assert deviation(Rejection(), lazily(grow), p, 3) < EXACT


@pytest.mark.parametrize("widths", [[1, 1], [2, 1], [3, 1]])
@pytest.mark.parametrize("procedure", [sampled, onehot, independent])
def test_forbidden_drafts_stay_in_the_tree_as_dead_nodes(procedure, widths: list[int]) -> None:
    for seed in SEEDS:
        p = masked(table(("p", seed), 4), seed, 4)
        grow = killing(procedure(table(("q", seed), 4), widths), p)
        assert deviation(Rejection(), lazily(grow), p, 3) < EXACT


@pytest.mark.parametrize("widths", [[1], [1, 1], [2, 1]])
def test_two_rounds_in_a_row_keep_the_law(widths: list[int]) -> None:
    """Also the joint of tokens that different rounds emitted."""
    for seed in range(2 if len(widths) == 1 else 1):
        p, q = table(("p", seed), 3), table(("q", seed), 3)
        off = deviation(Rejection(), lazily(sampled(q, widths)), p, len(widths) + 2, rounds=2)
        assert off < EXACT


@pytest.mark.parametrize("procedure", [sampled, onehot])
def test_drafting_the_whole_tree_first_is_the_same(procedure) -> None:
    """The lazy trees of the other tests stand for real ones."""
    p, q = masked(table("p", 3), 0, 3), table("q", 3)
    grow = killing(procedure(q, [2, 1]), p)
    lazy, eager = (round_law(Rejection(), how(grow), p) for how in (lazily, eagerly))
    assert lazy.keys() == eager.keys()
    assert all(abs(lazy[k] - eager[k]) < EXACT for k in lazy)


def test_acceptance_of_a_chain_is_one_minus_total_variation() -> None:
    p, q = table("p", 5), table("q", 5)
    law = round_law(Rejection(), lazily(sampled(q, [1])), p)
    accepted = sum(w for text, w in law.items() if len(text) == 2)
    assert accepted == pytest.approx(float(torch.minimum(p(()), q(())).sum()), abs=EXACT)


def test_a_refused_draft_with_nothing_left_falls_back_on_the_target() -> None:
    """p == q up to rounding: a refusal of probability zero must not divide by zero."""
    p = table("p", 3)

    tree = lazily(sampled(p, [1]))(Branch([]), ())
    verdict = Rejection()(tree, TableRows(p, tree), Unlucky(), 0)
    assert verdict.path == []
    assert len(verdict.tokens) == 1


def test_the_harness_knows_the_target() -> None:
    p = table("p", 3)
    law = joint(p, 2)
    assert sum(law.values()) == pytest.approx(1)
    assert law[(0, 1)] == pytest.approx(float(p(())[0] * p((0,))[1]))
