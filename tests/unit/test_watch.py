"""Choosing drafters by looks: what a draft would have got, and what is lost until that is known."""

from __future__ import annotations

import random

import pytest

from foretell import LLM, SamplingParams
from foretell.core import registry
from foretell.core.errors import InputError
from foretell.core.tree import TokenTree
from foretell.drafters.watch import EAGER, SHARE, Look, Watch, got
from helpers_model import Cost, pair


@pytest.mark.parametrize(
    ("text", "emitted"),
    [([1, 3, 9], 3), ([1, 9, 9], 2), ([2, 3, 9], 2), ([8, 1, 3], 1), ([1, 3], 3)],
)
def test_what_a_tree_would_have_got(text: list[int], emitted: int) -> None:
    tree = TokenTree.build([7], [1, 2, 3], [-1, -1, 0])
    assert got(tree, text) == emitted
    assert got(TokenTree.context([7]), text) == 1


def test_a_dead_node_gets_nothing() -> None:
    tree = TokenTree.build([7], [1, 3], [-1, 0])
    tree.kill(tree.tokens == 3)
    assert got(tree, [1, 3, 9]) == 2


def test_a_look_waits_until_the_text_has_judged_every_tree() -> None:
    trees = [TokenTree.context([5, 6]), TokenTree.build([5, 6], [1, 2, 3], [-1, 0, -1])]
    look, watch = Look(10, 0, trees, [1.0, 1.0]), Watch(2)
    assert [got(trees[1], text) for text in ([], [1], [1, 2], [3], [8])] == [0, 0, 3, 2, 1]
    assert not watch.saw(look, [1])
    assert watch.tokens == [0.0, 0.0]
    assert watch.saw(look, [1, 2])
    assert watch.rate(1) == 3 * watch.rate(0)


class World:
    """Drafters that draft one chain a step: each has its chance that a drafted token comes, its
    length, and the seconds of a step (plain: 1); a text may be hard for all of them."""

    def __init__(self, drafters: list[tuple[float, int, float]], seed: int) -> None:
        self.drafters, self.dice = drafters, random.Random(seed)

    def text(self) -> float:
        return min(1.2, max(0.4, self.dice.gauss(0.95, 0.2)))

    def look(self, ease: float, player: int) -> tuple[Look, list[int]]:
        """Token 1 is right; who is right farther is also right nearer, as drafters agree."""
        luck = [self.dice.random() for _ in range(20)]
        trees = [
            TokenTree.chain([0], [1 if luck[i] < p * ease else 2 for i in range(n)])
            for p, n, _ in self.drafters
        ]
        return Look(0, player, trees, [s for _, _, s in self.drafters]), [1] * 20

    def tokens(self, arm: int, ease: float) -> float:
        p, n, _ = self.drafters[arm]
        return sum((p * ease) ** i for i in range(n + 1))

    def loss(self, watch: Watch, steps: int, real: list[float] | None = None) -> float:
        """Against the best drafter of all steps; `real`: the seconds of steps, where the model of
        them is wrong."""
        real = real or [s for _, _, s in self.drafters]
        sums = [[0.0, 0.0] for _ in range(len(real) + 1)]
        ease = self.text()
        for step in range(steps):
            ease = self.text() if step % 40 == 0 else ease
            arm = watch.choose()
            for i, a in enumerate([*range(len(real)), arm]):
                sums[i][0] += self.tokens(a, ease)
                sums[i][1] += real[a]
            if watch.due:
                watch.looked(0.05)
                watch.saw(*self.look(ease, arm))
            else:
                modelled = self.drafters[arm][2]
                watch.took(arm, modelled, real[arm] * (1 + self.dice.gauss(0, 0.1)))
        *each, own = [tokens / seconds for tokens, seconds in sums]
        return 1 - own / max(each)


WORLDS = {
    "blend": [(0.78, 12, 1.33), (0.74, 12, 1.3), (0.70, 8, 1.2), (0.0, 0, 1.0)],
    "lookup": [(0.65, 12, 1.5), (0.65, 12, 1.4), (0.75, 8, 1.15), (0.0, 0, 1.0)],
    "useless": [(0.05, 8, 1.3), (0.05, 16, 1.4), (0.02, 8, 1.2), (0.0, 0, 1.0)],
}


@pytest.mark.parametrize("name", WORLDS)
def test_little_is_lost_from_the_first_step_on(name: str) -> None:
    losses = [World(WORLDS[name], s).loss(Watch(4), 300) for s in range(12)]
    assert sum(losses) / len(losses) < 0.03


def test_steps_that_take_longer_than_modelled_are_found_out() -> None:
    """The first drafter looks best, but its steps take half as much again."""
    real = [2.0, 1.3, 1.2, 1.0]
    losses = [World(WORLDS["blend"], s).loss(Watch(4), 400, real) for s in range(12)]
    assert sum(losses) / len(losses) < 0.04


def test_a_drafter_that_becomes_good_is_seen_while_another_plays() -> None:
    world, watch = World(WORLDS["useless"], 0), Watch(4)
    world.loss(watch, 300)
    assert watch.leader == 3
    world.drafters = WORLDS["lookup"]
    assert world.loss(watch, 300) < 0.2
    assert watch.leader == 2


def test_a_long_copy_is_not_counted_at_each_of_the_players_steps() -> None:
    """A text of copies of 12 tokens and 4 tokens that nobody knows. One drafter copies 3 at a time
    (step: 1.0), the other 12 (step: 1.6), so they take 4 * 1 + 3 * 1 and 4 * 1.6 + 1.6 a round."""
    for player, length in ((0, 3), (1, 12)):
        watch, place = Watch(2), 0
        for _ in range(400):
            left = max(0, 12 - place % 16)
            trees = [TokenTree.chain([0], [1] * n if left else [2] * n) for n in (3, 12)]
            step = 1 + min(length, left)
            for tree in trees:
                tree.tokens[1 + min(left, len(tree) - 1) :] = 2
            watch.saw(Look(0, player, trees, [1.0, 1.6]), [1] * 20)
            place += step
        rates = [16 / 7, 16 / 8]
        assert watch.rate(0) > watch.rate(1), "whoever plays"
        for i in range(2):
            assert abs(watch.rate(i) / rates[i] - 1) < 0.25


def test_looking_is_paid_for() -> None:
    watch, looks = Watch(2), 0
    for _ in range(2000):
        if watch.due:
            watch.looked(0.5)
            looks += 1
        watch.took(0, 1.0, 1.0)
    assert EAGER < looks <= EAGER + 2 + SHARE * 2000 / 0.5


def test_one_slow_step_is_not_held_against_a_drafter_for_ever() -> None:
    watch = Watch(2)
    look = Look(0, 1, [TokenTree.chain([0], [1]), TokenTree.context([0])], [1.0, 1.0])
    watch.leader, watch.judged = 1, EAGER
    for _ in range(3):
        watch.took(0, 1.0, 9.0)
    assert watch.off[0] > 1.9
    for _ in range(60):
        watch.saw(look, [1, 1])
    assert watch.choose() == 0


def test_the_bandit_watches_and_says_what_plain_decoding_says() -> None:
    target, context = pair()
    parts = [registry.create("drafter", d, context) for d in ("suffix", "prompt-lookup", "none")]
    bandit = type(registry.create("drafter", "bandit", context))(parts, cost=Cost(0.05))
    assert bandit.rule == "watch"
    llm = LLM(target, draft=bandit, context=context)
    params = SamplingParams(max_tokens=150)
    prompts = [[1, 2, 3, 1, 2], [4, 4, 4, 4]]
    got = [o.token_ids for o in llm.generate(prompts, params)]
    plain = LLM(target, draft="none", context=context)
    assert got == [o.token_ids for o in plain.generate(prompts, params)]
    assert sum(w.looks for w in bandit.player.known.values()) >= EAGER
    assert all(sum(w.tokens) > 0 for w in bandit.player.known.values())


def test_watching_parts_that_draw_is_refused() -> None:
    with pytest.raises(InputError, match="rule=ucb"):
        registry.create("drafter", "bandit:of=draft-model+none,rule=watch", pair()[1])
