"""Wrong variants of the rules: the exact harness must fail on each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from foretell.core.tree import Kind
from foretell.verify import block, greedy_draft, multipath, spectr
from foretell.verify.block import Block
from foretell.verify.greedy_draft import GreedyDraft
from foretell.verify.multipath import MultiPath
from foretell.verify.specinfer import SpecInfer
from foretell.verify.spectr import SpecTr
from helpers_drafts import (
    Grow,
    iid,
    independent,
    killing,
    lazily,
    masked,
    paths,
    sampled,
    table,
    top_one,
)
from helpers_exact import Branch, Child, Prefix, Table, deviation


def worst(rule, make: Callable[[Table], Grow], vocab: int = 3, horizon: int = 3, seeds: int = 3):
    """The largest deviation over several tables."""
    return max(
        deviation(rule, lazily(make(table(("q", seed), vocab))), table(("p", seed), vocab), horizon)
        for seed in range(seeds)
    )


CASES = {
    "block": (Block(), lambda q: sampled(q, [1, 1])),
    "multipath": (MultiPath(), lambda q: paths(q, 2, 2)),
    "spectr": (SpecTr(), lambda q: paths(q, 2, 1)),
    "greedy-draft": (GreedyDraft(), lambda q: top_one(q, [2])),
    "specinfer": (SpecInfer(), lambda q: iid(q, [2])),
}


@pytest.mark.parametrize("name", CASES)
def test_the_right_ones(name: str) -> None:
    assert worst(*CASES[name]) < 1e-12


def stops_early(tree, nodes, p, q, rng, position):
    """Ends the scan at the first length that fails, as token-level rules do."""

    class Once:
        failed = False

        def flip(self, chance, w, where, index):
            stands = not self.failed and rng.flip(chance, w, where, index)
            self.failed = self.failed or not stands
            return stands

        pick = staticmethod(rng.pick)

    return block.verify_block(tree, nodes, p, q, Once(), position)


def token_residual(tree, nodes, p, q, rng, position):
    """Draws the next token as token-level rejection would: from p - q, not from P p - q."""
    verdict = block.verify_block(tree, nodes, p, q, _NoBonus(rng), position)
    n = len(verdict.path)
    rest = (p[n] - q[n]).clamp(min=0) if n < len(q) else p[n]
    verdict.tokens[-1] = rng.pick(rest if rest.sum() > 0 else p[n], 0)
    return verdict


class _NoBonus:
    def __init__(self, rng: Branch) -> None:
        self.flip = rng.flip

    def pick(self, p, position):
        return 0


@pytest.mark.parametrize("wrong", [stops_early, token_residual])
def test_block_verified_like_single_tokens(monkeypatch, wrong) -> None:
    right = block.verify_block
    monkeypatch.setattr(block, "verify_block", lambda *a: _with(right, wrong, a))
    assert worst(*CASES["block"]) > 1e-3


def _with(right, wrong, args):
    """`wrong` calls the module's function, which is patched: give it the right one."""
    patched, block.verify_block = block.verify_block, right
    try:
        return wrong(*args)
    finally:
        block.verify_block = patched


def test_block_without_the_cap_at_one(monkeypatch) -> None:
    right = block.block_chances

    def uncapped(p, q, tokens):
        mass, chances = right(p, q, tokens)
        ratio = [float(p[i, x] / q[i, x]) for i, x in enumerate(tokens)]
        return mass, [*chances[:-1], min(1.0, float(torch.tensor(ratio).prod()))]

    monkeypatch.setattr(block, "block_chances", uncapped)
    assert worst(*CASES["block"]) > 1e-3


def test_the_selected_chain_verified_with_the_drafters_own_law(monkeypatch) -> None:
    right = multipath.selection

    def untilted(p, q, paths, better, mass):
        ranks, _, before = right(p, q, paths, better, mass)
        return ranks, q, before

    monkeypatch.setattr(multipath, "selection", untilted)
    assert worst(*CASES["multipath"]) > 0.01


@pytest.mark.parametrize("forgotten", ["better", "mass"])
def test_the_selected_chain_without_what_came_before(monkeypatch, forgotten: str) -> None:
    right = multipath.selection

    def forgetful(p, q, paths, better, mass):
        if forgotten == "better":
            return right(p, q, paths, 0.0, mass)
        return right(p, q, paths, better, 1.0)

    monkeypatch.setattr(multipath, "selection", forgetful)
    assert worst(*CASES["multipath"]) > 1e-3


def test_the_number_of_chains_taken_from_the_survivors(monkeypatch) -> None:
    """K is the number drafted, not the number that shares the prefix."""

    def count(q: Table) -> Grow:
        inner = paths(q, 3, 1)

        def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
            children = inner(branch, prefix, level)
            return [c for c in children if c[2] != Kind.DEAD]  # repeats forgotten

        return grow

    assert worst(CASES["multipath"][0], count) > 1e-3
    assert worst(CASES["spectr"][0], count) > 1e-3


@pytest.mark.parametrize("scale", [0.8, 1.3])
def test_a_wrong_scale_for_all_draws(monkeypatch, scale: float) -> None:
    """A flip at another scale than the residual's; a smaller one leaves a negative residual."""
    right = spectr.k_seq

    def off(p, q, k):
        rho, rest = right(p, q, k)
        return rho * scale, rest

    monkeypatch.setattr(spectr, "k_seq", off)
    assert worst(*CASES["spectr"]) > 1e-3


def test_the_residual_of_rejection_under_one_scale(monkeypatch) -> None:
    right = spectr.k_seq
    monkeypatch.setattr(
        spectr, "k_seq", lambda p, q, k: (right(p, q, k)[0], (p - q).clamp(min=0) + 1e-12)
    )
    assert worst(*CASES["spectr"]) > 1e-3


def test_the_drawn_child_handed_over_with_the_whole_q() -> None:
    """It was drawn from q without the most probable tokens."""

    def whole(q: Table) -> Grow:
        inner = top_one(q, [2])

        def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
            found = inner(branch, prefix, level)
            return [(x, None if row is None else q(prefix), kind) for x, row, kind in found]

        return grow

    assert worst(CASES["greedy-draft"][0], whole) > 1e-3


def test_a_fresh_token_after_the_drawn_child_is_refused(monkeypatch) -> None:
    right = greedy_draft.refuse_in_turn

    def forgetful(tree, full, children, here, test):
        hit, _ = right(tree, full, children, here, test)
        return hit, full

    monkeypatch.setattr(greedy_draft, "refuse_in_turn", forgetful)
    assert worst(*CASES["greedy-draft"]) > 1e-3


@pytest.mark.parametrize("name", ["specinfer", "spectr"])
def test_independent_siblings_that_share_a_row(name: str) -> None:
    """A shared row says: without replacement."""

    def shared(q: Table) -> Grow:
        inner = independent(q, [3])

        def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
            return [(x, q(prefix), kind) for x, _, kind in inner(branch, prefix, level)]

        return grow

    assert worst(CASES[name][0], shared, vocab=4, horizon=2, seeds=6) > 1e-4


def test_chains_forgotten_where_a_constraint_forbids_them() -> None:
    def forget(q: Table, p: Table) -> Grow:
        inner = killing(sampled(q, [1, 1]), p)

        def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
            return [c for c in inner(branch, prefix, level) if c[2] != Kind.DEAD]

        return grow

    p = masked(table("p", 4), 0, 4)
    off = deviation(Block(), lazily(forget(table("q", 4), p)), p, 3)
    assert off > 0.01
