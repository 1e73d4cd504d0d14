"""Choosing drafters by looks: what a draft would have got, and what is lost until that is known."""

from __future__ import annotations

import random

import pytest

from foretell import LLM, SamplingParams
from foretell.core import registry
from foretell.core.errors import InputError
from foretell.core.tree import TokenTree
from foretell.drafters.bursts import STEPS, Burst, Walk, got
from foretell.drafters.watch import EAGER, MARGIN, SHARE, SPREAD, Watch
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


def test_a_walk_takes_its_own_steps() -> None:
    """Drafts of 3 on the text 1 1 1 1 2 1 ..: 4 tokens, then (asked at the player's next step) 1,
    which stands for the two up to where it is asked again."""
    text, walk = [9, 1, 1, 1, 1, 2, 1, 1, 1, 1], Walk()
    assert walk.free(1)
    walk.step(1, TokenTree.chain([9], [1, 1, 1]), 2.0)
    walk.read(text[:4])
    assert not walk.free(4), "3 tokens came, and nobody knows about the fourth"
    walk.read(text[:5])
    assert walk.emitted == 4
    assert not walk.free(4)
    assert walk.free(5)
    walk.step(5, TokenTree.chain([1], [1, 1, 1]), 3.0)
    walk.read(text[:7])
    walk.step(7, TokenTree.chain([1], [1, 1]), 5.0)
    assert walk.spent == 2.0 + 2 * 3.0
    walk.read(text)
    walk.close(9)
    assert walk.spent == 2.0 + 2 * 3.0 + 5.0 * 2 / 3, "3 tokens are its step's, 2 are asked for"


def test_a_burst_ends_when_the_text_has_judged_every_tree() -> None:
    burst, text = Burst([Walk(), Walk()], 1), [5]
    burst.walks[1].step(1, TokenTree.build([5], [1, 1, 2], [-1, 0, 1]), 3.0)
    for _ in range(STEPS):
        assert burst.open
        burst.walks[0].step(len(text), TokenTree.context([5]), 1.0)
        burst.steps += 1
        text.append(1 if len(text) < 3 else 2)
        judged = burst.read(text)
    assert judged
    assert (burst.start, burst.end) == (1, 1 + STEPS)
    assert [w.spent for w in burst.walks] == [STEPS, 3.0 * STEPS / 4]

    burst = Burst([Walk(), Walk()], 1, steps=STEPS)
    burst.walks[0].step(1, TokenTree.context([5]), 1.0)
    burst.walks[1].step(1, TokenTree.build([5], [1, 2, 3], [-1, 0, -1]), 1.0)
    assert not burst.read([5, 1]), "2 may come behind it, or not"
    assert burst.read([5, 1, 7])
    assert (burst.start, burst.end) == (1, 2)
    assert [w.spent for w in burst.walks] == [1.0, 1 / 2]


class World:
    """Texts that a drafter knows by chance: the token at a place comes as drafted if the luck of
    the place is below the drafter's chance, so drafters agree. Each drafts a chain: (chance,
    length, seconds of a step; plain: 1). Texts are easier or harder, by stretches."""

    def __init__(self, drafters: list[tuple[float, int, float]], seed: int) -> None:
        self.drafters, dice = drafters, random.Random(seed)
        self.luck: list[float] = []
        while len(self.luck) < 6000:
            ease = min(1.2, max(0.4, dice.gauss(0.95, 0.2)))
            self.luck += [dice.random() / ease for _ in range(120)]
        self.dice = dice

    def draft(self, i: int, at: int) -> list[int]:
        """1 is what comes."""
        p, n, _ = self.drafters[i]
        return [1 if luck < p else 2 for luck in self.luck[at : at + n]]

    def alone(self, i: int, length: int, seconds: float) -> float:
        """What it takes for a text of so many tokens."""
        at, spent = 0, 0.0
        while at < length:
            at += got(TokenTree.chain([0], self.draft(i, at)), [1] * 40)
            spent += seconds
        return spent

    def loss(self, watch: Watch, steps: int, real: list[float] | None = None) -> float:
        """Against the best drafter on the same text; `real`: the seconds of steps, where the model
        of them is wrong."""
        real = real or [s for _, _, s in self.drafters]
        at, spent, burst = 0, 0.0, None
        for step in range(steps):
            arm = watch.leader
            tree = TokenTree.chain([0], self.draft(arm, at))
            if burst is None and watch.due(step):
                burst = watch.begin(at)
            if burst is not None and burst.open:
                for i, walk in enumerate(burst.walks):
                    if walk.free(at):
                        walk.step(at, TokenTree.chain([0], self.draft(i, at)), self.drafters[i][2])
                burst.steps += 1
                watch.looked(0.05)
            watch.earned(real[arm])
            if step % 4 == 0:
                seconds = real[arm] * (1 + self.dice.gauss(0, 0.1))
                watch.took(arm, self.drafters[arm][2], seconds)
            at, spent = at + got(tree, [1] * 40), spent + real[arm]
            if burst is not None and burst.read([1] * at):
                watch.saw(burst)
                burst = None
        return 1 - min(self.alone(i, at, s) for i, s in enumerate(real)) / spent


WORLDS = {
    "blend": [(0.78, 12, 1.33), (0.74, 12, 1.3), (0.70, 8, 1.2), (0.0, 0, 1.0)],
    "lookup": [(0.65, 12, 1.5), (0.65, 12, 1.4), (0.75, 8, 1.15), (0.0, 0, 1.0)],
    "useless": [(0.05, 8, 1.3), (0.05, 16, 1.4), (0.02, 8, 1.2), (0.0, 0, 1.0)],
}


@pytest.mark.parametrize("name", WORLDS)
def test_little_is_lost_from_the_first_step_on(name: str) -> None:
    losses = [World(WORLDS[name], s).loss(Watch(4), 600) for s in range(12)]
    assert sum(losses) / len(losses) < 0.03


def test_steps_that_take_longer_than_modelled_are_found_out() -> None:
    """The first drafter looks best, but its steps take half as much again."""
    real = [2.0, 1.3, 1.2, 1.0]
    losses = [World(WORLDS["blend"], s).loss(Watch(4), 400, real) for s in range(12)]
    assert sum(losses) / len(losses) < 0.06


def test_a_drafter_that_becomes_good_is_seen_while_another_plays() -> None:
    watch = Watch(4)
    World(WORLDS["useless"], 0).loss(watch, 300)
    assert watch.leader == 3
    World(WORLDS["lookup"], 1).loss(watch, 300)
    assert watch.leader == 2


class Stays(Watch):
    def choose(self) -> None:
        """Nobody else plays."""


def test_copies_are_counted_as_each_takes_them() -> None:
    """A text of copies of 12 tokens and 4 tokens that nobody knows. One drafter copies 3 at a time
    (step: 1.0), the other 12 (step: 1.6), so they take 4 * 1 + 3 * 1 and 4 * 1.6 + 1.6 a round."""
    world = World([(0.5, 3, 1.0), (0.5, 12, 1.6)], 0)
    rounds = [[0.0] * 12 + [1.0] * 4 for _ in range(500)]
    for place in range(0, 500, 7):  # or the bursts keep step with them
        rounds[place] += [1.0] * 2
    world.luck = [luck for text in rounds for luck in text]
    for player in range(2):
        watch = Stays(2, leader=player, credit=1e9)  # looks all the time
        world.loss(watch, 800)
        for i, rate in enumerate([16 / 7, 16 / 8]):
            assert abs(watch.rate(i) / rate - 1) < 0.25


def test_looking_is_paid_for() -> None:
    watch, bursts = Watch(2), 0
    for _ in range(2000):
        if watch.due(SPREAD):
            watch.begin(0)
            watch.looked(0.5)
            bursts += 1
        watch.earned(1.0)
    assert EAGER < bursts <= EAGER + 2 + SHARE * 2000 / 0.5


def burst(*seconds: float) -> Burst:
    return Burst([Walk(spent=s) for s in seconds], 0, STEPS, 10)


def test_bursts_that_agree_on_nothing_do_not_depose_the_leader() -> None:
    watch = Watch(2)
    for spent in [(0.4, 1.0), (1.0, 0.4), (0.4, 0.9), (1.0, 0.4)]:
        watch.saw(burst(*spent))
    assert watch.rate(1) > (1 + MARGIN) * watch.rate(0)
    assert watch.leader == 0
    for _ in range(12):
        watch.saw(burst(0.7, 0.6))
    assert watch.leader == 1


def test_one_slow_step_is_not_held_against_a_drafter_for_ever() -> None:
    watch = Watch(2, leader=1)
    for _ in range(3):
        watch.took(0, 1.0, 9.0)
    assert watch.off[0] > 1.7
    for _ in range(60):
        watch.saw(burst(1 / 2, 1.0))
    assert watch.leader == 0


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
    assert sum(w.bursts for w in bandit.player.known.values()) >= EAGER
    assert all(w.tokens > 0 for w in bandit.player.known.values())


def test_watching_parts_that_draw_is_refused() -> None:
    with pytest.raises(InputError, match="rule=ucb"):
        registry.create("drafter", "bandit:of=draft-model+none,rule=watch", pair()[1])
