"""The walk of greedy and replay: what it asks for, and that every way of asking says the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from foretell import LLM
from foretell.core.rng import Purpose, SeqRng
from foretell.core.tree import TokenTree
from foretell.verify.greedy import Greedy
from foretell.verify.lexical_units import LexicalUnits
from foretell.verify.replay import Replay
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
