"""Choosing drafters by looks: what a draft would have got, and what is lost until that is known."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from foretell import LLM, SamplingParams
from foretell.core import registry
from foretell.core.errors import InputError
from foretell.core.feedback import Feedback, Rows, Verdict
from foretell.core.protocols import Budget, Needs, Promise, SeqView
from foretell.core.rng import SeqRng
from foretell.core.tree import TokenTree
from foretell.drafters.bursts import STEPS, Burst, Heard, Walk, judge
from foretell.drafters.looks import Looks
from foretell.drafters.watch import EAGER, MARGIN, PROOF, SHARE, Watch
from helpers_model import Cost, pair


@pytest.mark.parametrize(
    ("text", "path", "checked"),
    [
        ([1, 3, 9], [1, 3], 2),
        ([1, 9, 9], [1], 2),
        ([2, 3, 9], [2], 1),
        ([8, 1, 3], [], 1),
        ([1, 3], None, 0),
        ([1], None, 0),
        ([], None, 0),
    ],
)
def test_what_a_tree_would_have_got(text: list[int], path: list[int] | None, checked: int) -> None:
    tree = TokenTree.build([7], [1, 2, 3], [-1, -1, 0])
    verdict = judge(tree, text)
    if path is None:
        assert verdict is None, "what comes behind it is not known yet"
    else:
        assert verdict is not None
        assert (verdict.path, verdict.checked) == (path, checked)
        assert verdict.tokens == text[: len(path) + 1]


def test_without_a_draft_a_step_emits_one_token() -> None:
    verdict = judge(TokenTree.context([7]), [1, 3])
    assert verdict is not None
    assert (verdict.path, verdict.tokens, verdict.checked) == ([], [1], 0)
    assert judge(TokenTree.context([7]), []) is None


def test_a_dead_node_gets_nothing() -> None:
    tree = TokenTree.build([7], [1, 3], [-1, 0])
    tree.kill(tree.tokens == 3)
    verdict = judge(tree, [1, 3, 9])
    assert verdict is not None
    assert (verdict.path, verdict.checked) == ([1], 1)


def test_a_walk_takes_its_own_steps() -> None:
    """Drafts of 3 on the text 1 1 1 1 2 1 ..: 4 tokens, then 1, then 4; of the last step two lie
    before the end."""
    text, walk = [9, 1, 1, 1, 1, 2, 1, 1, 1, 1], Walk(1)
    walk.step(TokenTree.chain([9], [1, 1, 1]), 2.0)
    assert walk.read(text[:4]) is None, "3 tokens came, and nobody knows about the fourth"
    assert walk.at == 1
    assert walk.read(text[:5]) is not None
    assert walk.at == 5
    assert walk.read(text) is None, "its next step has not begun"
    walk.step(TokenTree.chain([1], [1, 1, 1]), 3.0)
    walk.read(text[:6])
    assert (walk.at, walk.spent) == (6, 5.0)
    walk.step(TokenTree.chain([2], [1, 1, 1]), 8.0)
    walk.read(text)
    assert (walk.at, walk.spent) == (10, 13.0)
    assert walk.until(8) == 5.0 + 8.0 * 2 / 4
    assert walk.until(12) == 13.0


def test_a_burst_ends_when_everybody_has_walked_to_its_end() -> None:
    burst, text = Burst.begin(0, 2, 1), [5]
    lazy = burst.walks[1]
    for _ in range(STEPS):
        assert burst.open
        burst.steps += 1
        burst.walks[0].step(TokenTree.context([5]), 1.0)
        text.append(1)
        burst.read(text)
        burst.walks[0].read(text)
        assert not burst.over
    assert (burst.start, burst.end, burst.reach([*text, 1])) == (1, 1 + STEPS, 1 + STEPS)
    while lazy.at < burst.end:
        lazy.step(TokenTree.chain([1], [1, 1]), 3.0)
        assert lazy.read([*text, 1, 1, 1]) is not None
    assert burst.over
    assert burst.seconds() == [STEPS, 3.0 * STEPS / 3]


def test_a_text_may_end_within_a_burst() -> None:
    """The player copied 4 tokens in its only step; who plods has come as far; who drafted more than
    there was to come has come to the end, with its second step."""
    burst, text = Burst.begin(0, 3, 1), [5, 1, 1, 1, 1]
    burst.steps = 1
    burst.walks[0].step(TokenTree.chain([5], [1, 1, 1]), 2.0)
    burst.walks[0].read(text)
    for _ in range(4):
        burst.walks[1].step(TokenTree.context([5]), 1.0)
        burst.walks[1].read(text)
    burst.walks[2].step(TokenTree.chain([5], [1]), 1.5)
    burst.walks[2].read(text)
    burst.walks[2].step(TokenTree.chain([1], [1, 1, 1, 1]), 1.5)
    assert burst.walks[2].read(text) is None
    assert not burst.over
    burst.stop(text)
    assert burst.over
    assert burst.seconds() == [2.0, 4.0, 3.0]


def feedback(tree: TokenTree, verdict: Verdict, at: int, tap: int) -> Feedback:
    """The rows of tokens[:n] hold n."""
    n = torch.arange(at, at + len(tree)).float()
    rows = np.full(len(tree), -1, np.int64)
    path = [tree.tip, *verdict.path]
    rows[path] = np.arange(len(path))
    kept = n[:, None].expand(-1, 3).contiguous()
    return Feedback(verdict.tokens, path, tree, Rows(kept, rows), verdict, {tap: Rows(-kept, rows)})


def test_who_walks_is_told_what_a_step_of_its_own_would_have_shown() -> None:
    """The player took 1 + 1, then 2 + 1 tokens from 4 on; a step from 5 on crosses the seam."""
    heard, tap = Heard(), 1
    for at, taken in ((4, 1), (6, 2)):
        tree = TokenTree.chain([0], [1] * 3)
        step = Verdict(list(range(1, taken + 1)), [1] * (taken + 1), taken + 1)
        f = feedback(tree, step, at, tap)
        heard.hear(f, at)
        f.logits.packed.zero_()  # the next forward writes over it
    tree = TokenTree.build([0], [2, 1, 1, 3], [-1, -1, 1, 2])
    verdict = judge(tree, [1, 1, 4])
    assert verdict is not None
    told = heard.feedback(5, tree, verdict)
    assert told is not None
    assert (told.tokens, told.path, told.tree) == ([1, 1, 4], [0, 2, 3], tree)
    assert told.logits[[0, 2, 3]][:, 0].tolist() == [5.0, 6.0, 7.0]
    assert told.hidden[tap][[0, 2, 3]][:, 2].tolist() == [-5.0, -6.0, -7.0]
    assert not told.logits.has(1)
    assert not told.logits.has(4)
    assert heard.feedback(7, tree, verdict) is None, "nobody saw the rows behind the last tokens"


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
            at += self.got(i, at)
            spent += seconds
        return spent

    def got(self, i: int, at: int) -> int:
        verdict = judge(TokenTree.chain([0], self.draft(i, at)), [1] * 40)
        assert verdict is not None
        return len(verdict.tokens)

    def step(self, walk: Walk, i: int) -> None:
        walk.step(TokenTree.chain([0], self.draft(i, walk.at)), self.drafters[i][2])

    def loss(self, watch: Watch, steps: int, real: list[float] | None = None) -> float:
        """Against the best drafter on the same text; `real`: the seconds of steps, where the model
        of them is wrong."""
        real = real or [s for _, _, s in self.drafters]
        at, spent, burst = 0, 0.0, None
        for step in range(steps):
            arm = watch.leader if burst is None else burst.player
            if burst is None and watch.due():
                burst = watch.begin(arm, at)
            if burst is not None and burst.open:
                burst.steps += 1
                self.step(burst.walks[arm], arm)
            watch.earned(real[arm])
            if step % 4 == 0:
                seconds = real[arm] * (1 + self.dice.gauss(0, 0.1))
                watch.took(arm, self.drafters[arm][2], seconds)
            at, spent = at + self.got(arm, at), spent + real[arm]
            if burst is not None:
                text = [1] * at
                burst.read(text)
                for i, walk in enumerate(burst.walks):
                    while (walk.tree or i != arm) and walk.at < burst.reach(text):
                        if walk.tree is None:
                            self.step(walk, i)
                            watch.looked(0.03)
                        if walk.read(text) is None:
                            break
                if burst.over:
                    watch.saw(burst)
                    burst = None
        return 1 - min(self.alone(i, at, s) for i, s in enumerate(real)) / spent


WORLDS = {
    "blend": [(0.78, 12, 1.33), (0.74, 12, 1.3), (0.70, 8, 1.2), (0.0, 0, 1.0)],
    "lookup": [(0.65, 12, 1.5), (0.65, 12, 1.4), (0.75, 8, 1.15), (0.0, 0, 1.0)],
    "useless": [(0.05, 8, 1.3), (0.05, 16, 1.4), (0.02, 8, 1.2), (0.0, 0, 1.0)],
}


@pytest.mark.parametrize(("name", "most"), [("blend", 0.015), ("lookup", 0.045), ("useless", 0.02)])
def test_little_is_lost_from_the_first_step_on(name: str, most: float) -> None:
    losses = [World(WORLDS[name], s).loss(Watch(4), 600) for s in range(12)]
    assert sum(losses) / len(losses) < most


def test_steps_that_take_longer_than_modelled_are_found_out() -> None:
    """The first drafter looks best, but its steps take half as much again."""
    real = [2.0, 1.3, 1.2, 1.0]
    losses = [World(WORLDS["blend"], s).loss(Watch(4), 400, real) for s in range(12)]
    assert sum(losses) / len(losses) < 0.08


def test_a_drafter_that_becomes_good_is_seen_while_another_plays() -> None:
    watch = Watch(4)
    World(WORLDS["useless"], 0).loss(watch, 300)
    assert watch.leader == 3
    World(WORLDS["lookup"], 1).loss(watch, 300)
    assert watch.leader == 2


class Stays(Watch):
    """Nobody else plays, and it looks all the time."""

    def choose(self) -> None: ...

    def due(self) -> bool:
        return True


def test_copies_are_counted_as_each_takes_them() -> None:
    """A text of copies of 12 tokens and 4 tokens that nobody knows. One drafter copies 3 at a time
    (step: 1.0), the other 12 (step: 1.6), so they need 3 + 4 and 1 + 3 steps a round. Each is
    judged as if it had played, whoever does."""
    world = World([(0.5, 3, 1.0), (0.5, 12, 1.6)], 0)
    rounds = [[0.0] * 12 + [1.0] * 4 for _ in range(500)]
    for place in range(0, 500, 7):  # or the bursts keep step with them
        rounds[place] += [1.0] * 2
    world.luck = [luck for text in rounds for luck in text]
    truth = [5000 / world.alone(i, 5000, step) for i, step in enumerate((1.0, 1.6))]
    assert truth == pytest.approx([16 / 7, 16 / 6.4], rel=0.06)
    for player in range(2):
        watch = Stays(2, leader=player)
        world.loss(watch, 1500)
        found = [watch.tokens / seconds for seconds in watch.seconds]
        assert found == pytest.approx(truth, rel=0.1)


def test_looking_is_paid_for() -> None:
    watch, bursts = Watch(2), 0
    for _ in range(2000):
        if watch.due():
            watch.begin(0, 0)
            watch.looked(0.5)
            bursts += 1
        watch.earned(1.0)
    assert EAGER < bursts <= EAGER + 2 + SHARE * 2000 / 0.5


def test_all_classes_pay_from_one_purse_and_only_the_first_is_eager() -> None:
    def spent(watches: list[Watch]) -> float:
        looked = 0.0
        for step in range(1000):
            watch = watches[step // 10 % len(watches)]
            if watch.due():
                watch.begin(0, 0)
                watch.looked(0.5)
                looked += 0.5
            watch.earned(1.0)
        return looked

    first = Watch(2)
    assert spent([first]) > SHARE * 1000 + 0.5
    heirs = [first.heir() for _ in range(4)]
    assert all(heir.purse is first.purse for heir in heirs)
    assert SHARE * 1000 / 2 < spent(heirs) <= SHARE * 1000 + 0.5


def test_looks_begin_anywhere_in_a_text() -> None:
    """Most in their first steps would say that there is little to copy."""
    watch, begun = Watch(2, bursts=EAGER), []
    for _ in range(1000):
        for step in range(20):
            if watch.due():
                begun.append(step)
                watch.begin(0, 0)
                watch.looked(5.37 * SHARE * 20)  # one in some five texts
            watch.earned(1.0)
    assert len(begun) > 100
    counts = np.bincount(begun, minlength=20)
    assert counts.max() < 2.5 * len(begun) / 20
    assert counts[0] < 2 * len(begun) / 20


def test_looks_get_rarer_until_another_takes_the_lead() -> None:
    def looks(watch: Watch, *spent: float) -> int:
        count, leader = 0, watch.leader
        for _ in range(3000):
            if watch.leader != leader:
                break
            if watch.due():
                watch.begin(0, 0)
                watch.looked(0.5)
                watch.saw(burst(*spent))
                count += 1
            watch.earned(1.0)
        return count

    watch = Watch(2)
    first, later, late = (looks(watch, 1.0, 2.0) for _ in range(3))
    assert SHARE * 3000 / 0.5 > first > 1.5 * later >= 1.5 * late > 10
    looks(watch, 2.0, 1.0)
    assert watch.leader == 1
    assert looks(watch, 2.0, 1.0) > 1.5 * late


def burst(*seconds: float) -> Burst:
    return Burst(0, [Walk(10, spent=s) for s in seconds], 0, STEPS, 10)


def test_bursts_that_agree_on_nothing_do_not_depose_the_leader() -> None:
    watch = Watch(2)
    for spent in [(0.4, 1.0), (1.0, 0.4), (0.4, 0.9), (1.0, 0.4)]:
        watch.saw(burst(*spent))
    assert watch.rate(1) > (1 + MARGIN) * watch.rate(0)
    assert watch.leader == 0
    for _ in range(12):
        watch.saw(burst(0.7, 0.6))
    assert watch.leader == 1


def test_a_small_lead_is_not_enough_while_rare_luck_may_not_have_come_yet() -> None:
    """Three bursts that agree on a tenth; where they agree on half they are enough."""
    for other, leader in ((0.9, 0), (0.5, 1)):
        watch = Watch(2)
        for _ in range(PROOF):
            assert watch.leader == 0
            watch.saw(burst(1.0, other))
        assert watch.leader == leader
        for _ in range(12):
            watch.saw(burst(1.0, other))
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
    assert max(w.judged for w in bandit.player.known.values()) >= 1


class Spy:
    """Drafts the last token thrice; notes where it is asked and what it is told. It reads rows."""

    name, promise, paper = "spy", Promise.EXACT, ""
    needs, shapes = Needs(logits=True), frozenset({"chain", "onehot"})

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []  # tokens shown, rows in the cache
        self.told: list[tuple[int, list[int], list[int]]] = []  # after so many asks: ids, best

    def begin(self, view: SeqView) -> None:
        return None

    def propose(self, states: Any, views: Any, budgets: Any) -> list[TokenTree]:
        (view,) = views
        self.asked.append((list(view.tokens), view.cached))
        return [TokenTree.chain(view.pending, [view.tokens[-1]] * 3)]

    def observe(self, states: Any, feedback: Any) -> None:
        (f,) = feedback
        nodes = [f.tree.tip, *f.verdict.path]
        self.told.append((len(self.asked), f.tokens, f.logits[nodes].argmax(-1).tolist()))

    def end(self, state: None) -> None:
        """Nothing to free."""


def test_who_does_not_play_is_shown_and_told_only_what_stands_before_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Watch, "due", lambda self: self.bursts < 1)
    target, context = pair(vocab=3, seed=2)
    spy = Spy()
    parts = [registry.create("drafter", "none", context), spy]
    bandit = type(registry.create("drafter", "bandit", context))(parts, cost=Cost(9.0))
    llm = LLM(target, draft=bandit, context=context)
    (out,) = llm.generate([[1, 2, 0]], SamplingParams(max_tokens=STEPS + 6, temperature=0.0))
    text, place = [1, 2, 0, *out.token_ids], 0
    inside = spy.told[: len(spy.asked)]  # later it is told of the player's steps
    assert len(inside) >= STEPS / 4
    assert 1 in [len(ids) for _, ids, _ in inside] != [1] * len(inside)
    for n, ((shown, cached), (after, ids, best)) in enumerate(zip(spy.asked, inside, strict=True)):
        assert after == n + 1, "it is told of a step of its own before it is asked for the next"
        assert shown == text[: len(shown)]
        assert cached == len(shown) - 1
        assert not place or len(shown) == place, "its steps follow each other"
        place = len(shown) + len(ids)
        assert ids == best == text[len(shown) : place], "the rows are those of its own places"
    watch = next(iter(bandit.player.known.values()))
    assert watch.judged == 1
    assert watch.leader == 0
    monkeypatch.setattr(Watch, "due", lambda self: self.bursts < 2)
    llm.generate([[1, 2, 0]], SamplingParams(max_tokens=STEPS + 2, temperature=0.0))
    assert watch.judged == 2, "the burst that was under way when the text was over"


def test_a_burst_has_one_player_and_its_first_step_catches_up() -> None:
    _, context = pair()
    parts = [registry.create("drafter", d, context) for d in ("prompt-lookup", "none")]
    looks = Looks(parts, Cost(0.05), lambda *_: TokenTree.context([1]))
    view = SeqView([1, 2, 3], 3, SamplingParams(), SeqRng(1))
    play = looks.begin(None, view, [None, None])
    assert looks.choose(play) == 0
    for at, seconds in ((3, 0.1), (4, 5.0)):  # the first of all is what there is to go by
        view.tokens[3:] = [1] * (at - 3)
        play.burst, play.watch.purse.credit, play.watch.ticks = None, 1.0, 4
        looks.drafted(play, view, Budget(8, 8), TokenTree.context([1]), seconds, 1)
        assert play.burst is not None
        assert looks.drafting[0] == 0.1
    play.burst.walks[0].at = 5
    looks.drafted(play, view, Budget(8, 8), TokenTree.context([1]), 0.2, 1)
    assert looks.drafting[0] > 0.1
    play.watch.leader = 1
    assert looks.choose(play) == 0, "until the burst is judged"
    play.burst = None
    assert looks.choose(play) == 1


def test_watching_parts_that_draw_is_refused() -> None:
    with pytest.raises(InputError, match="rule=ucb"):
        registry.create("drafter", "bandit:of=draft-model+none,rule=watch", pair()[1])
