"""Wrong variants of drafting and verification: the exact harness must fail on each of them.

Every test runs the right procedure and the wrong one on the same tables: TV 0 and TV > 0.
"""

from __future__ import annotations

from collections.abc import Callable

from foretell.core.feedback import Verdict
from foretell.core.tree import Kind, TokenTree
from foretell.verify.rejection import Rejection
from helpers_drafts import (
    Grow,
    independent,
    killing,
    lazily,
    masked,
    mixed,
    onehot,
    sampled,
    table,
)
from helpers_exact import Branch, Child, Prefix, Table, TableRows, deviation

EXACT = 1e-12
RIGHT = Rejection()
Drafting = Callable[[Branch, Prefix], TokenTree]


def worst(
    make: Callable[[Table, Table], Grow | Drafting],
    verify: Callable = RIGHT,
    *,
    vocab: int = 4,
    horizon: int = 2,
    rounds: int = 1,
    seeds: int = 4,
    target: Callable[[Table, int], Table] = lambda p, seed: p,
    total: int = 0,
    whole: bool = False,
) -> float:
    """The largest deviation over several tables; make(p, q) gives the draft procedure."""
    off = 0.0
    for seed in range(seeds):
        p = target(table(("p", seed), vocab), seed)
        q = table(("q", seed), vocab, total=total)
        made = make(p, q)
        draft = made if whole else lazily(made)
        off = max(off, deviation(verify, draft, p, horizon, rounds))
    return off


def edited(inner: Grow, edit: Callable[[Prefix, list[Child]], list[Child]]) -> Grow:
    def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
        return edit(prefix, inner(branch, prefix, level))

    return grow


class NotRenormalised(Rejection):
    """Forgets that the next sibling was drawn from what was left of q."""

    def __call__(self, tree, p: TableRows, rng, position: int) -> Verdict:
        current, path = tree.tip, []
        while True:
            rest, hit, rows = p.probs([current])[0].clone(), -1, {}
            for child in tree.children(current):
                x, row = int(tree.tokens[child]), int(tree.qrow[child])
                q = rows.setdefault(row, tree.q[row].clone())
                if rng.flip(float(rest[x]), float(q[x]), 0, 0):
                    hit = child
                    break
                rest = (rest - q).clamp(min=0)
                q[x] = 0  # and no `q /= q.sum()`
                rest = rest / rest.sum()
            if hit < 0:
                bonus = rng.pick(rest, 0)
                return Verdict(path, [*(int(tree.tokens[n]) for n in path), bonus])
            path.append(hit)
            current = hit


class FreshBonus(Rejection):
    """Draws the bonus token from the target instead of from what the refusals left of it."""

    def __call__(self, tree, p: TableRows, rng, position: int) -> Verdict:
        class NoResidual:
            flip = staticmethod(rng.flip)
            pick = staticmethod(lambda rest, here: -1)

        v = super().__call__(tree, p, NoResidual(), position)
        last = v.path[-1] if v.path else tree.tip
        return Verdict(v.path, [*v.tokens[:-1], rng.pick(p.probs([last])[0])])


def test_q_not_renormalised_after_a_refusal() -> None:
    """Small (TV below 0.02) and zero for some tables: hence several."""
    assert worst(lambda p, q: sampled(q, [3]), seeds=6) < EXACT
    assert worst(lambda p, q: sampled(q, [3]), NotRenormalised(), seeds=6) > 1e-4


def test_bonus_drawn_from_the_target_instead_of_the_residual() -> None:
    assert worst(lambda p, q: sampled(q, [2]), FreshBonus()) > 0.02


def test_siblings_sorted_after_they_were_drawn() -> None:
    def resort(p: Table, q: Table) -> Grow:
        def edit(prefix: Prefix, children: list[Child]) -> list[Child]:
            return sorted(children, key=lambda c: -float(q(prefix)[c[0]]))

        return edited(sampled(q, [2]), edit)

    assert worst(resort) > 0.05


def test_deterministic_drafts_tested_with_q() -> None:
    def confident(p: Table, q: Table) -> Grow:
        def edit(prefix: Prefix, children: list[Child]) -> list[Child]:
            row = q(prefix)
            return [(x, row, kind) for x, _, kind in children]

        return edited(onehot(q, [2]), edit)

    assert worst(lambda p, q: onehot(q, [2])) < EXACT
    assert worst(confident) > 0.1


def unlikely_dropped(widths: list[int]) -> Callable[[Table, Table], Grow]:
    def make(p: Table, q: Table) -> Grow:
        def edit(prefix: Prefix, children: list[Child]) -> list[Child]:
            row = q(prefix)
            return [c for c in children if row[c[0]] >= 1 / len(row)]

        return edited(sampled(q, widths), edit)

    return make


def test_sampled_token_dropped_because_its_q_is_low() -> None:
    assert worst(unlikely_dropped([1, 1]), horizon=3) > 0.02


def test_siblings_pruned_by_q() -> None:
    assert worst(unlikely_dropped([3])) > 0.02


def test_stopping_below_a_kept_token_is_allowed() -> None:
    """The right form of a confidence rule: the unlikely token stays, nothing is drafted below."""

    def make(p: Table, q: Table) -> Grow:
        inner = sampled(q, [2, 2])

        def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
            if prefix and q(prefix[:-1])[prefix[-1]] < 0.25:
                return []
            return inner(branch, prefix, level)

        return grow

    assert worst(make, horizon=3, vocab=3) < EXACT


def test_admission_by_the_tokens_own_q() -> None:
    """A slot counts only if the product of q along the path, its own included, is large enough."""

    def make(p: Table, q: Table) -> Grow:
        inner = sampled(q, [1, 1])

        def grow(branch: Branch, prefix: Prefix, level: int) -> list[Child]:
            children = inner(branch, prefix, level)
            survival = 1.0
            for i, x in enumerate(prefix):
                survival *= float(q(prefix[:i])[x])
            return [c for c in children if survival * float(q(prefix)[c[0]]) > 0.15]

        return grow

    assert worst(make, horizon=3, vocab=3) > 0.01


def test_duplicate_draws_skipped() -> None:
    """With replacement a duplicate is refused for sure, but its refusal still counts."""

    def skip(p: Table, q: Table) -> Grow:
        def edit(prefix: Prefix, children: list[Child]) -> list[Child]:
            first = {c[0]: c for c in reversed(children)}
            return [c for c in children if first[c[0]] is c]

        return edited(independent(q, [3]), edit)

    assert worst(lambda p, q: independent(q, [3]), seeds=6) < EXACT
    assert worst(skip, seeds=6) > 1e-4


def test_draw_dropped_because_it_equals_a_retrieved_sibling() -> None:
    def drop(p: Table, q: Table) -> Grow:
        def edit(prefix: Prefix, children: list[Child]) -> list[Child]:
            return children[:1] + [c for c in children[1:] if c[0] != children[0][0]]

        return edited(mixed(q, [1], sampled_first=False), edit)

    assert worst(lambda p, q: mixed(q, [1], sampled_first=False)) < EXACT
    assert worst(drop) > 0.01


def test_illegal_sampled_drafts_forgotten() -> None:
    def forget(p: Table, q: Table) -> Grow:
        def edit(prefix: Prefix, children: list[Child]) -> list[Child]:
            return [c for c in children if c[2] != Kind.DEAD]

        return edited(killing(sampled(q, [2]), p), edit)

    def ban(p: Table, seed: int) -> Table:
        return masked(p, seed, 4)

    assert worst(lambda p, q: killing(sampled(q, [2]), p), target=ban) < EXACT
    assert worst(forget, target=ban) > 0.02


def test_bonus_token_reused_as_a_draw_of_the_next_round() -> None:
    """Yesterday's bonus token was not drawn from today's q."""

    def make(p: Table, q: Table) -> Drafting:
        def reuse(branch: Branch, text: Prefix) -> TokenTree:
            row = q(text)
            again = text[-1] if text else branch.choose(row.tolist())
            return TokenTree.chain([0], [again], q=row[None])

        return reuse

    assert worst(make, vocab=3, horizon=2, whole=True) < EXACT  # one round cannot see it
    assert worst(make, vocab=3, horizon=4, rounds=2, whole=True) > 0.01


def test_noise_reused_across_rounds() -> None:
    """Each round is right by itself; only the joint of two rounds shows the correlation.

    The noise is one number in 0..K-1, turned into a token by the inverse of q's sums of K-ths. The
    wrong variant gives tree slot 0 the same number in every round.
    """
    k = 8

    def make(fresh: bool) -> Callable[[Table, Table], Drafting]:
        def procedure(p: Table, q: Table) -> Drafting:
            noise: list[int] = []

            def draft(branch: Branch, text: Prefix) -> TokenTree:
                if fresh or not text:
                    noise[:] = [branch.choose([1] * k)]
                row = q(text)
                sums = (row.cumsum(0) * k).round()
                return TokenTree.chain([0], [int((sums > noise[0]).nonzero()[0])], q=row[None])

            return draft

        return procedure

    def off(fresh: bool, rounds: int) -> float:
        return worst(make(fresh), vocab=3, horizon=3, rounds=rounds, total=k, whole=True, seeds=2)

    assert off(fresh=True, rounds=1) < EXACT
    assert off(fresh=False, rounds=1) < EXACT
    assert off(fresh=True, rounds=2) < EXACT
    assert off(fresh=False, rounds=2) > 1e-3
