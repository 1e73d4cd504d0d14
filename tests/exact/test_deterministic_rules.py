"""`greedy` and `replay` say, for every tree, what plain decoding says with the same seed."""

from __future__ import annotations

import random

import pytest
import torch

from foretell.core.protocols import Verifier
from foretell.core.rng import Purpose, SeqRng
from foretell.core.tree import TokenTree
from foretell.verify.greedy import Greedy
from foretell.verify.rejection import Rejection
from foretell.verify.replay import Replay
from helpers_drafts import eagerly, killing, masked, mixed, onehot, sampled, table
from helpers_exact import Branch, Prefix, Table, TableRows

VOCAB = 5


def plain(verifier: Verifier, p: Table, rng: SeqRng, length: int) -> Prefix:
    """One token a step: the tip alone, nothing drafted."""
    text: Prefix = ()
    while len(text) < length:
        tree = TokenTree.context([0])
        text += tuple(verifier(tree, TableRows(p, tree, text), rng, len(text)).tokens)
    return text


class Randomly(Branch):
    """Takes one random path through the outcomes."""

    def __init__(self, seed: int) -> None:
        super().__init__([])
        self.random = random.Random(seed)

    def choose(self, weights) -> int:
        return self.random.choices(range(len(weights)), weights)[0]


def speculate(verifier: Verifier, p: Table, rng: SeqRng, length: int, grow, seed: int) -> Prefix:
    text: Prefix = ()
    branch = Randomly(seed)
    while len(text) < length:
        tree = eagerly(grow)(branch, text)
        verdict = verifier(tree, TableRows(p, tree, text), rng, len(text))
        assert len(verdict.tokens) == len(verdict.path) + 1
        assert tree.tokens[verdict.path].tolist() == verdict.tokens[:-1]
        text += tuple(verdict.tokens)
    return text[:length]


@pytest.mark.parametrize("verifier", [Greedy(), Replay()], ids=["greedy", "replay"])
@pytest.mark.parametrize("widths", [[1, 1, 1], [2, 2, 1], [3, 2, 1]])
@pytest.mark.parametrize("constrained", [False, True])
def test_output_is_that_of_plain_decoding(verifier, widths: list[int], constrained: bool) -> None:
    for seed in range(25):
        p, q = table(("p", seed), VOCAB, "zeros"), table(("q", seed), VOCAB)
        if constrained:
            p = masked(table(("p", seed), VOCAB), seed, VOCAB)
        rng = SeqRng(seed)
        want = plain(verifier, p, rng, 9)
        for procedure in (sampled(q, widths), onehot(q, widths), mixed(q, widths, True)):
            got = speculate(verifier, p, SeqRng(seed), 9, killing(procedure, p), seed)
            assert got == want


def test_replay_is_the_gumbel_trick() -> None:
    p = table("p", VOCAB)
    for seed in range(50):
        rng = SeqRng(seed)
        tree = TokenTree.context([0])
        token = Replay()(tree, TableRows(p, tree), rng, 7).tokens[0]
        gumbel = -rng.race([7], Purpose.TARGET, VOCAB)[0].log()
        assert token == int((p(()).log() + gumbel).argmax())


def test_rejection_without_drafts_draws_from_the_target() -> None:
    p = table("p", VOCAB, "point")
    tree = TokenTree.context([0])
    verdict = Rejection()(tree, TableRows(p, tree), SeqRng(1), 0)
    assert verdict.path == []
    assert verdict.tokens == [int(p(()).argmax())]
    assert verdict.checked == 0


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    def p(prefix: Prefix) -> torch.Tensor:
        return torch.tensor([0.1, 0.3, 0.3, 0.3])

    tree = TokenTree.chain([0], [2, 1])
    verdict = Greedy()(tree, TableRows(p, tree), SeqRng(0), 0)
    assert verdict.tokens == [1]
    assert verdict.checked == 1


@pytest.mark.parametrize("verifier", [Greedy(), Replay(), Rejection()])
def test_verdict_counts_the_levels_it_tried(verifier) -> None:
    p = table("p", VOCAB, "point")
    chain: list[int] = []
    for _ in range(3):
        chain.append(int(p(tuple(chain)).argmax()))
    first, last = (chain[0] + 1) % VOCAB, (chain[2] + 1) % VOCAB
    for tokens, checked in ((chain, 3), ([*chain[:2], last], 3), ([first, *chain[1:]], 1)):
        tree = TokenTree.chain([0], tokens)
        assert verifier(tree, TableRows(p, tree), SeqRng(0), 0).checked == checked
