"""The walk of greedy and replay: what it asks for, and that every way of asking says the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from foretell import LLM
from foretell.core.feedback import Verdict
from foretell.core.rng import Purpose, SeqRng
from foretell.core.tree import TokenTree
from foretell.verify.greedy import Greedy
from foretell.verify.greedy_draft import GreedyDraft
from foretell.verify.lexical_units import LexicalUnits
from foretell.verify.rejection import Rejection
from foretell.verify.replay import Replay
from foretell.verify.walk import Settled, refuse_in_turn
from helpers_model import pair

VOCAB = 12
#            tip -> 1 -> 3 -> 5
#               \-> 2 -> 4
TREE = ([1, 2, 3, 4, 5], [-1, -1, 0, 1, 2])


class Rows:
    """The target's rows of a tree, with a note of every node that was asked about."""

    def __init__(self, seed: int, host: bool, greedy: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(6, VOCAB, generator=generator)
        self.logits[[0, 1, 3], [1, 3, 5]] += torch.randint(0, 6, (3,), generator=generator)
        self.host, self.deterministic = host, greedy
        self.asked: list[list[int]] = []

    def probs(self, nodes: Sequence[int], read: Sequence[int] | None = None) -> torch.Tensor:
        self.asked.append(list(nodes))
        return self.logits[list(nodes)].softmax(-1)

    def greedy(self, nodes: Sequence[int]) -> list[int]:
        self.asked.append(list(nodes))
        return self.logits[list(nodes)].argmax(-1).tolist()

    def raw(self, node: int) -> tuple[torch.Tensor, float] | None:
        return None if node == 1 else (self.logits[node], 1.0)

    def hidden(self, tap, nodes):
        raise AssertionError


class Racing:
    """A model that samples from logits, and finds every other race too close to call."""

    def __init__(self) -> None:
        self.calls = 0

    def race(self, logits: torch.Tensor, temperature: float, key: int) -> int:
        self.calls += 1
        if self.calls % 2:
            return -1
        (position,) = [t for t in range(20) if SeqRng(5).key(t, Purpose.TARGET) == key]
        return SeqRng(5).pick((logits / temperature).softmax(-1), position, Purpose.TARGET)


@pytest.mark.parametrize("rule", [Greedy(), Replay(), LexicalUnits(0.3)], ids=lambda r: r.name)
def test_nothing_off_the_walk_is_computed(rule) -> None:
    """On the host the nodes of the path are asked about, once each; on a device all at once."""
    lengths = set()
    for seed in range(40):
        greedy = rule.name != "replay" and seed % 2 == 0
        host, device = (Rows(seed, h, greedy) for h in (True, False))
        tree = TokenTree.build([7], *TREE)
        verdict = rule(tree, host, SeqRng(5), 1)
        assert verdict == rule(TokenTree.build([7], *TREE), device, SeqRng(5), 1)
        assert device.asked[0] == [0, 1, 2, 3, 4, 5]
        nodes = [0, *verdict.path]
        if rule.name == "lexical-units":  # looks at what else is likely where nothing agrees
            assert {n for [n] in host.asked} == set(nodes)
        else:
            assert host.asked == [[n] for n in nodes]
        lengths.add(len(verdict.path))
    assert lengths >= {0, 1, 3}


def test_a_quick_race_says_the_same() -> None:
    racing = Racing()
    for seed in range(40):
        want = Replay()(TokenTree.build([7], *TREE), Rows(seed, True), SeqRng(5), 1)
        rows = Rows(seed, True)
        assert Replay(racing)(TokenTree.build([7], *TREE), rows, SeqRng(5), 1) == want
    assert racing.calls > 40


class KeyRng(SeqRng):
    """Whatever it is asked for, the noise is that of one key."""

    __slots__ = ("one",)

    def key(self, position: int, purpose: Purpose, salt: int = 0) -> int:
        return self.one


@pytest.mark.parametrize(
    ("options", "raced"),
    [
        ({}, True),
        ({"temperature": 0.7}, True),
        ({"top_k": 3}, False),
        ({"top_p": 0.9}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"logit_bias": {2: 1.0}}, False),
    ],
)
@pytest.mark.parametrize("draft", ["none", "prompt-lookup:tokens=5", "token-recycling:nodes=9"])
def test_models_race_where_nothing_but_temperature_applies(draft: str, options, raced) -> None:
    params = {"temperature": 1.0, "max_tokens": 40, "seed": 3, **options}
    plain, _ = pair(VOCAB)
    want = LLM(plain, draft=draft).generate([[1, 2, 3, 1, 2]], **params)[0]
    model, _ = pair(VOCAB)
    calls = []

    def race(logits: torch.Tensor, temperature: float, key: int) -> int:
        calls.append(temperature)
        rng = KeyRng(0)
        rng.one = key
        return rng.pick((logits / temperature).softmax(-1), 0)

    model.race = race  # type: ignore[attr-defined]
    got = LLM(model, draft=draft).generate([[1, 2, 3, 1, 2]], **params)[0]
    assert got.token_ids == want.token_ids
    assert len(calls) == (40 if raced else 0)
    assert set(calls) <= {params["temperature"]}


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("rule", [Greedy(), Replay(), LexicalUnits(0.3)], ids=lambda r: r.name)
def test_a_dead_node_never_stands(rule, host: bool) -> None:
    """Not even for the very token that the target says: the sibling that lives does."""
    for seed in range(10):
        rows = Rows(seed, host, rule.name != "replay")
        says = rule(TokenTree.context([7]), rows, SeqRng(5), 1).tokens[0]
        tree = TokenTree.build([7], [says, says, 3], [-1, -1, 0])
        tree.kill(np.array([False, True, False, False]))
        verdict = rule(tree, rows, SeqRng(5), 1)
        assert verdict.path == [2]
        tree.kill(np.array([False, True, True, False]))
        assert rule(tree, rows, SeqRng(5), 1) == Verdict([], [says], 1)


def test_greedy_draft_says_a_token_whose_node_is_dead_but_does_not_go_on_below_it() -> None:
    for seed in range(10):
        says = GreedyDraft()(TokenTree.context([7]), Rows(seed, True), SeqRng(5), 1).tokens[0]
        tree = TokenTree.build([7], [says, 3], [-1, 0])
        tree.kill(np.array([False, True, False]))
        assert GreedyDraft()(tree, Rows(seed, True), SeqRng(5), 1) == Verdict([], [says], 1)


@pytest.mark.parametrize("qrow", [None, [0]])
def test_accepting_what_is_forbidden_is_an_error_and_no_text(qrow) -> None:
    """A row that does not exclude a DEAD node's token says that processors and masks disagree."""
    q = None if qrow is None else torch.full((1, VOCAB), 1 / VOCAB)
    tree = TokenTree.build([7], [4], [-1], qrow=qrow, q=q)
    tree.kill(np.array([False, True]))

    class Lucky(SeqRng):
        def flip(self, p: float, w: float, position: int, index: int) -> bool:
            return True

    with pytest.raises(AssertionError, match="forbidden"):
        Rejection()(tree, Rows(0, True), Lucky(0), 1)


def never(node: int, left: float, q: float, here: int, index: int) -> bool:
    return False


class TestRefusals:
    """`refuse_in_turn` where nothing can go on as usual."""

    def test_the_targets_row_is_left_as_it_was(self) -> None:
        """Whoever hands it over may still need it; it is also what a refusal of chance 0 leaves."""
        for options in ({}, {"qrow": [0], "q": torch.tensor([[0.0, 1.0, 0.0]])}):
            tree = TokenTree.build([7], [1], [-1], **options)
            full = torch.tensor([0.0, 1.0, 0.0])
            hit, rest = refuse_in_turn(tree, full, [1], 0, never)
            assert hit == -1
            assert full.tolist() == rest.tolist() == [0.0, 1.0, 0.0]

    def test_a_row_that_is_used_up_takes_nothing_more(self) -> None:
        tree = TokenTree.build([7], [1, 2], [-1, -1], qrow=[0, 0], q=torch.eye(3)[1:2])
        rest = refuse_in_turn(tree, torch.tensor([0.0, 0.5, 0.5]), [1, 2], 0, never)[1]
        assert rest.tolist() == [0.0, 0.0, 1.0]

    def test_rows_of_another_precision_are_read_in_the_targets(self) -> None:
        p = torch.tensor([0.5, 0.25, 0.25])
        for dtype in (torch.bfloat16, torch.float64):
            tree = TokenTree.build([7], [0], [-1], qrow=[0], q=torch.eye(3, dtype=dtype)[:1])
            rest = refuse_in_turn(tree, p, [1], 0, never)[1]
            assert rest.dtype == torch.float32
            assert rest.tolist() == [0.0, 0.5, 0.5]


def test_settled_rows_are_certain_at_temperature_zero_only() -> None:
    for greedy in (True, False):
        rows = Rows(3, True, greedy)
        settled = Settled(rows)
        want = rows.probs([2, 4])
        if greedy:
            want = torch.nn.functional.one_hot(want.argmax(-1), VOCAB).float()
        assert torch.equal(settled.probs([2, 4]), want)
        assert (settled.raw(2) is None) == greedy
        assert settled.greedy([2, 4]) == rows.greedy([2, 4])
        assert (settled.host, settled.deterministic) == (True, greedy)
