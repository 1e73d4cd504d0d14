"""Every lossless rule's output has exactly the target's law: all random outcomes are enumerated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from foretell.core.protocols import Promise
from foretell.core.rng import SeqRng
from foretell.core.tree import TokenTree
from foretell.verify.block import Block, block_chances
from foretell.verify.greedy_draft import GreedyDraft
from foretell.verify.multipath import MultiPath
from foretell.verify.rejection import Rejection
from foretell.verify.specinfer import SpecInfer
from foretell.verify.spectr import SpecTr
from helpers_drafts import (
    Grow,
    eagerly,
    iid,
    independent,
    killing,
    lazily,
    masked,
    mixed,
    onehot,
    paths,
    repeats_dead,
    sampled,
    table,
    top_one,
    withheld,
)
from helpers_exact import Branch, Child, Prefix, Table, TableRows, deviation, outcomes, round_law
from helpers_rng import Unlucky

EXACT = 1e-12
RULES = {
    r.name: r for r in (Rejection(), SpecInfer(), SpecTr(), GreedyDraft(), Block(), MultiPath())
}
TREES = [name for name in RULES if "tree" in RULES[name].accepts]

TABLES = {  # target, draft
    "dense": ("dense", "dense"),
    "target zeros": ("zeros", "dense"),
    "draft zeros": ("dense", "zeros"),
    "both zeros": ("zeros", "zeros"),
    "disjoint": ("even", "odd"),
    "certain target": ("point", "dense"),
    "certain draft": ("dense", "point"),
}
# rule, draft procedure, vocabulary: trees drawn the way the rule asks for
DRAWN: dict[str, tuple[str, Callable[[Table], Grow], int]] = {
    "specinfer 3": ("specinfer", lambda q: iid(q, [3]), 4),
    "specinfer 2-2": ("specinfer", lambda q: iid(q, [2, 2]), 3),
    "spectr 3 x 1": ("spectr", lambda q: paths(q, 3, 1), 3),
    "spectr 2 x 2": ("spectr", lambda q: paths(q, 2, 2), 3),
    "greedy-draft 3": ("greedy-draft", lambda q: top_one(q, [3]), 4),
    "greedy-draft 2-2-1": ("greedy-draft", lambda q: top_one(q, [2, 2, 1]), 3),
    "multipath 3 x 1": ("multipath", lambda q: paths(q, 3, 1), 3),
    "multipath 2 x 2": ("multipath", lambda q: paths(q, 2, 2), 3),
    "rejection of chains": ("rejection", lambda q: paths(q, 2, 2), 3),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_promises_the_law(name: str) -> None:
    assert RULES[name].promise is Promise.LOSSLESS


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("name", list(RULES)[1:])
def test_chains(name: str, tables: str) -> None:
    target, draft = TABLES[tables]
    for seed in range(2):
        for length, vocab in ((2, 4), (3, 3)):
            p, q = table(("p", seed), vocab, target), table(("q", seed), vocab, draft)
            off = deviation(RULES[name], lazily(sampled(q, [1] * length)), p, length + 1)
            assert off < EXACT, (seed, length, off)


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("case", DRAWN)
def test_trees_drawn_for_the_rule(case: str, tables: str) -> None:
    name, procedure, vocab = DRAWN[case]
    target, draft = TABLES[tables]
    p, q = table("p", vocab, target), table("q", vocab, draft)
    assert deviation(RULES[name], lazily(procedure(q)), p, 3) < EXACT


@pytest.mark.parametrize("case", DRAWN)
def test_forbidden_drafts_are_dead_nodes(case: str) -> None:
    name, procedure, vocab = DRAWN[case]
    for seed in range(2):
        p = masked(table(("p", seed), vocab), seed, vocab)
        grow = killing(procedure(table(("q", seed), vocab)), p)
        assert deviation(RULES[name], lazily(grow), p, 3) < EXACT


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("procedure", [sampled, onehot])
def test_forbidden_tokens_in_chains(name: str, procedure) -> None:
    for seed in range(3):
        p = masked(table(("p", seed), 4), seed, 4)
        grow = killing(procedure(table(("q", seed), 4), [1, 1, 1]), p)
        assert deviation(RULES[name], lazily(grow), p, 3) < EXACT


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("procedure", [onehot, withheld])
def test_one_hot_chains(name: str, procedure) -> None:
    for target in ("dense", "zeros", "point"):
        p, q = table("p", 4, target), table("q", 4)
        assert deviation(RULES[name], lazily(procedure(q, [1, 1])), p, 3) < EXACT


@pytest.mark.parametrize("name", TREES)
def test_one_hot_trees(name: str) -> None:
    for target in ("dense", "zeros", "point"):
        p, q = table("p", 4, target), table("q", 4)
        assert deviation(RULES[name], lazily(onehot(q, [3, 2])), p, 3) < EXACT


@pytest.mark.parametrize("name", ["rejection", "specinfer", "spectr", "greedy-draft"])
@pytest.mark.parametrize(
    "procedure",
    [
        lambda q: sampled(q, [2, 1]),
        lambda q: independent(q, [2, 1]),
        lambda q: top_one(q, [3, 2]),
        lambda q: mixed(q, [2, 1], True),
        lambda q: mixed(q, [2, 1], False),
    ],
    ids=["sampled", "independent", "top-one", "retrieved last", "retrieved first"],
)
def test_trees_of_every_other_encoding(name: str, procedure) -> None:
    """q rows say how siblings were drawn, so these rules hold for all of them."""
    p, q = table("p", 3, "zeros"), table("q", 3)
    assert deviation(RULES[name], lazily(procedure(q)), p, 3) < EXACT


@pytest.mark.parametrize("name", ["rejection", "specinfer", "spectr", "greedy-draft"])
def test_siblings_of_two_drafters(name: str) -> None:
    """Draws from two distributions, as a merge of two drafters hands them over."""
    for seed in range(3):
        p, one, two = (table((x, seed), 3) for x in "pqr")

        def grow(branch: Branch, prefix: Prefix, level: int, one=one, two=two) -> list[Child]:
            both = [iid(q, [1, 1])(branch, prefix, level) for q in (one, two)]
            return repeats_dead([*both[0], *both[1]])

        assert deviation(RULES[name], lazily(grow), p, 3) < EXACT


@pytest.mark.parametrize("name", ["block", "multipath", "greedy-draft", "spectr"])
def test_chains_that_mix_drawn_and_one_hot_tokens(name: str) -> None:
    p, q = table("p", 3), table("q", 3)
    drawn, fixed = sampled(q, [1] * 3), onehot(q, [1] * 3)
    for first in (0, 1):

        def grow(branch: Branch, prefix: Prefix, level: int, first: int = first):
            return (drawn if level % 2 == first else fixed)(branch, prefix, level)

        assert deviation(RULES[name], lazily(grow), p, 4) < EXACT


def test_the_selected_chain_remembers_all_that_came_before() -> None:
    """At the third token the better prefixes and the mass of two levels count."""
    for seed in range(3):
        p, q = table(("p", seed), 2), table(("q", seed), 2)
        assert deviation(RULES["multipath"], lazily(paths(q, 2, 3)), p, 4) < EXACT


@pytest.mark.parametrize("name", ["rejection", "specinfer", "spectr", "greedy-draft"])
def test_a_one_hot_child_stands_where_it_is_what_the_target_says(name: str) -> None:
    """Beside a draw that is refused it is as good a draft as any."""
    q = torch.tensor([[0.0, 0.0, 1.0]])
    tree = TokenTree.build([0], [2, 1, 0], [-1, -1, 1], qrow=[0, -1, -1], q=q)

    def p(prefix: Prefix) -> torch.Tensor:
        return torch.tensor([1.0, 0.0, 0.0] if prefix else [0.0, 1.0, 0.0])

    verdict = RULES[name](tree, TableRows(p, tree), SeqRng(0), 0)
    assert verdict.path == [2, 3]
    assert verdict.tokens == [1, 0, 0]


@pytest.mark.parametrize("name", ["block", "multipath"])
def test_chains_that_stop_below_a_kept_token(name: str) -> None:
    """A confidence rule makes chains of different lengths; it looks at kept tokens only."""
    for seed in range(3):
        p, q = table(("p", seed), 3), table(("q", seed), 3)
        inner = sampled(q, [1, 1, 1]) if name == "block" else paths(q, 2, 2)

        def grow(branch: Branch, prefix: Prefix, level: int, q=q, inner=inner):
            unsure = level > 0 and float(q(prefix[:-1])[prefix[-1]]) < 0.4
            return [] if unsure else inner(branch, prefix, level)

        assert deviation(RULES[name], lazily(grow), p, 4) < EXACT


@pytest.mark.parametrize(
    ("name", "procedure", "vocab"),
    [
        ("specinfer", lambda q: iid(q, [2]), 3),
        ("spectr", lambda q: paths(q, 2, 1), 2),
        ("greedy-draft", lambda q: top_one(q, [2]), 3),
        ("block", lambda q: sampled(q, [1, 1]), 2),
        ("multipath", lambda q: paths(q, 2, 1), 3),
    ],
    ids=["specinfer", "spectr", "greedy-draft", "block", "multipath"],
)
def test_two_rounds_in_a_row(name: str, procedure, vocab: int) -> None:
    """Also the joint of tokens that different rounds emitted."""
    p, q = table("p", vocab), table("q", vocab)
    assert deviation(RULES[name], lazily(procedure(q)), p, 4, rounds=2) < EXACT


@pytest.mark.parametrize("case", ["spectr 2 x 2", "multipath 2 x 2", "specinfer 2-2"])
def test_drafting_the_whole_tree_first_is_the_same(case: str) -> None:
    name, procedure, _ = DRAWN[case]
    p, q = masked(table("p", 3), 0, 3), table("q", 3, "zeros")
    grow = killing(procedure(q), p)
    lazy, eager = (round_law(RULES[name], how(grow), p) for how in (lazily, eagerly))
    assert lazy.keys() == eager.keys()
    assert all(abs(lazy[k] - eager[k]) < EXACT for k in lazy)


def accepted(name: str, grow: Grow, p: Table) -> float:
    """The expected number of accepted tokens of one round."""

    def run(branch: Branch) -> int:
        tree = lazily(grow)(branch, ())
        return RULES[name](tree, TableRows(p, tree), branch, 0).accepted

    return sum(n * w for n, w in outcomes(run).items())


def test_block_accepts_at_least_as_much_as_token_by_token() -> None:
    gains = []
    for seed in range(6):
        p, q = table(("p", seed), 3), table(("q", seed), 3)
        chain = sampled(q, [1, 1, 1])
        gains.append(accepted("block", chain, p) - accepted("rejection", chain, p))
    assert min(gains) > -EXACT
    assert max(gains) > 0.05


def test_one_path_is_block_verification() -> None:
    p, q = table("p", 3), table("q", 3)
    one = accepted("multipath", paths(q, 1, 2), p)
    assert one == pytest.approx(accepted("block", sampled(q, [1, 1]), p), abs=EXACT)


def test_two_paths_accept_more_than_one() -> None:
    gains = [
        accepted("multipath", paths(q, 2, 2), p) - accepted("block", sampled(q, [1, 1]), p)
        for p, q in ((table(("p", s), 3), table(("q", s), 3)) for s in range(4))
    ]
    assert sum(gains) > 0.1


@pytest.mark.parametrize("name", RULES)
def test_a_draft_that_equals_the_target_is_accepted(name: str) -> None:
    p = table("p", 3)
    assert accepted(name, sampled(p, [1, 1]), p) == pytest.approx(2, abs=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_nothing_drafted_draws_from_the_target(name: str) -> None:
    p = table("p", 3)
    law = round_law(RULES[name], lambda branch, text: TokenTree.context([0]), p)
    assert law == {(x,): pytest.approx(float(p(())[x])) for x in range(3)}


@pytest.mark.parametrize("name", RULES)
def test_a_refusal_of_probability_zero_leaves_something_to_draw(name: str) -> None:
    """p == q up to rounding: what is said then is something that the target may say."""
    for kind in ("dense", "zeros", "point"):
        p = table("p", 3, kind)
        grows = [sampled(p, [1]), sampled(p, [1, 1])]
        if name in TREES:
            grows += [paths(p, 2, 1), top_one(p, [2])]
        for grow in grows:
            tree = lazily(grow)(Branch([]), ())
            verdict = RULES[name](tree, TableRows(p, tree), Unlucky(), 0)
            at = tuple(verdict.tokens[:-1])
            assert p(at)[verdict.tokens[-1]] > 0


def test_a_draft_that_q_says_is_impossible_is_refused_by_block() -> None:
    """Rounding may leave nothing of a small q: the prefix is worth nothing, and no error."""
    p, q = torch.full((3, 4), 0.25), torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4])
    assert block_chances(p, q, [2, 1]) == ([1.0, 0.0, 0.0], [0.0, 0.0])


class Keys:
    """Notes the key of every number a rule asks for; flips come out at random."""

    def __init__(self, branch: Sequence[float]) -> None:
        self.coins, self.seen = list(branch), []

    def flip(self, p, w, position, index):
        self.seen.append(("flip", position, index))
        return self.coins[len(self.seen) % len(self.coins)] * w < p

    def pick(self, p, position):
        self.seen.append(("pick", position))
        return int(p.argmax())


@pytest.mark.parametrize("name", RULES)
def test_no_number_is_used_twice_in_rounds_that_follow_one_another(name: str) -> None:
    p, q = table("p", 4), table("q", 4)
    grow = {
        "rejection": sampled(q, [3, 2, 1]),
        "specinfer": iid(q, [3, 2, 1]),
        "spectr": paths(q, 3, 3),
        "greedy-draft": independent(q, [2, 2, 1]),  # several drawn: not its own, but lawful
        "block": sampled(q, [1, 1, 1]),
        "multipath": paths(q, 3, 3),
    }[name]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rng = Keys(torch.rand(97, generator=generator).tolist())
        choices = torch.randint(0, 4, (400,), generator=generator).tolist()

        class Randomly(Branch):
            def choose(self, weights, choices=choices):
                return choices.pop()

        text: Prefix = ()
        for _ in range(6):
            tree = lazily(grow)(Randomly([]), text)
            text += tuple(RULES[name](tree, TableRows(p, tree, text), rng, len(text)).tokens)
        assert len(rng.seen) == len(set(rng.seen))


@pytest.mark.parametrize("name", RULES)
def test_the_verdict_counts_the_levels_it_tried(name: str) -> None:
    p = table("p", 5, "point")
    chain: list[int] = []
    for _ in range(3):
        chain.append(int(p(tuple(chain)).argmax()))
    first, last = (chain[0] + 1) % 5, (chain[2] + 1) % 5
    for tokens, checked in ((chain, 3), ([*chain[:2], last], 3), ([first, *chain[1:]], 1)):
        tree = TokenTree.chain([0], tokens)
        assert RULES[name](tree, TableRows(p, tree), Branch([]), 0).checked == checked
