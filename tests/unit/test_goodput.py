"""goodput: the draft length with the most tokens per second, on simulated machines and texts."""

from __future__ import annotations

import collections
import itertools
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from foretell import InputError
from foretell.control.length.goodput.allocate import allocate, promise
from foretell.control.length.goodput.fits import Line, Tilt
from foretell.control.length.goodput.habits import Habits, widths
from foretell.control.length.goodput.policy import Goodput
from foretell.control.length.goodput.probes import Probes
from foretell.control.length.goodput.records import Record
from foretell.control.length.goodput.steptime import StepTime
from foretell.core.costs import GivenCosts
from foretell.core.feedback import Verdict
from foretell.core.params import SamplingParams
from foretell.core.protocols import Budget, BuildContext, Load, SeqView, Timings
from foretell.core.rng import SeqRng
from foretell.core.tree import TokenTree


class Machine:
    """A target, a drafter and a text, as far as a policy can see them. Seconds are exact up to
    `noise`; acceptance(step, sequence) and found(step, sequence) are probabilities. The policy
    sees verdicts that are drawn; what is counted is what a draft emits on average."""

    def __init__(
        self,
        target: Callable[[int, int], float],
        level: float,
        acceptance: Callable[[int, int], float],
        found: Callable[[int, int], float] = lambda step, i: 1.0,
        longest: int = 99,
        noise: float = 0.0,
        fixed: float = 0.0,
        lifetime: int = 1 << 30,
        scores: Sequence[float] = (),
    ) -> None:
        self.target, self.level, self.fixed, self.noise = target, level, fixed, noise
        self.acceptance, self.found, self.longest = acceptance, found, longest
        self.lifetime = lifetime  # steps until all sequences are over and others come
        self.scores = scores  # if any: a drafted token has one of them, and comes true as often

    def seconds(self, rows: int, context: int = 0, sequences: int = 1) -> float:
        return self.target(rows, sequences)

    def observe(self, rows: int, context: int, sequences: int, seconds: float) -> None:
        pass

    def run(self, policy, load: Callable[[float], int], steps: int, seed: int = 0) -> float:
        """Tokens per second of `steps` steps; load(seconds gone by): how many sequences run."""
        r = random.Random(seed)
        views: list[SeqView] = []
        emitted, elapsed = 0.0, 0.0
        for step in range(steps):
            running = load(elapsed)
            if step % self.lifetime == 0:
                views.clear()
            while len(views) < running:
                views.append(SeqView([1] * 4, 4, SamplingParams(max_tokens=1 << 20), SeqRng(1)))
            del views[running:]
            budgets = policy.budgets(views, Load(len(views)))
            trees, verdicts, came, worth, deepest = [], [], [], [], 0
            for i, (view, budget) in enumerate(zip(views, budgets, strict=True)):
                k = 0 if budget.none else min(budget.depth, self.longest)
                k = k if r.random() < self.found(step, i) else 0
                tree, n = self.draft(view, k, budget, r), 0
                k = tree.drafted
                chances = [self.acceptance(step, i)] * k if tree.score is None else tree.score[1:]
                while n < k and r.random() < chances[n]:
                    n += 1
                trees.append(tree)
                came.append(n)
                worth.append([1.0, *itertools.accumulate(chances, operator.mul)])
                deepest = max(deepest, k)
            if self.scores and hasattr(policy, "trim"):
                trees = policy.trim(trees)
            for view, tree, hits, tokens in zip(views, trees, came, worth, strict=True):
                k = tree.drafted
                n = min(hits, k)
                verdicts.append(Verdict(list(range(1, n + 1)), [1] * (n + 1), min(n + 1, k)))
                view.tokens += [1] * (n + 1)
                emitted += sum(tokens[: k + 1])
            rows = sum(map(len, trees))
            asked = any(not b.none for b in budgets)
            draft = (self.fixed if asked else 0.0) + self.level * deepest
            target = self.target(rows, len(views))
            elapsed += draft + target
            jitter = r.uniform(1 - self.noise, 1 + self.noise)
            policy.observe(
                trees,
                verdicts,
                Timings(draft * jitter, target, 0.0, rows, 0, len(views), True),
            )
        return emitted / elapsed

    def draft(self, view: SeqView, k: int, budget: Budget, r: random.Random) -> TokenTree:
        if not self.scores:
            return TokenTree.chain(view.tokens[-1:], [1] * k)
        scores: list[float] = []
        while len(scores) < k and not (scores and budget.stop and budget.stop(scores)):
            scores.append(r.choice(self.scores))
        return TokenTree.chain(view.tokens[-1:], [1] * len(scores), score=scores)

    def goodput(self, load, steps, **options) -> float:
        return self.run(Goodput(self, **options), load, steps)

    def best_fixed(self, load, steps) -> float:
        class Always:
            def __init__(self, k: int) -> None:
                self.k = k

            def budgets(self, views, load):
                return [Budget(1 << 30 if self.k else 0, self.k)] * len(views)

            def observe(self, trees, verdicts, timings):
                pass

        return max(self.run(Always(k), load, steps) for k in (0, 1, 2, 3, 4, 6, 8, 12))


def memory_bound(rows: int, sequences: int) -> float:
    return 1.0 + 0.02 * rows


def compute_bound(rows: int, sequences: int) -> float:
    return 0.1 + 0.9 * rows


def kinked(rows: int, sequences: int) -> float:
    """Free rows up to 16, then each costs: what a GPU does."""
    return 1.0 if rows <= 16 else rows / 16


def always(p: float) -> Callable[[int, int], float]:
    return lambda step, i: p


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("target", [memory_bound, compute_bound, kinked])
def test_as_fast_as_the_best_fixed_length_and_as_none(target, alpha: float, batch: int) -> None:
    machine = Machine(target, 0.12, always(alpha), noise=0.2)
    steps = 600 if batch < 32 else 200
    got = machine.goodput(lambda _: batch, steps)
    best = max(
        batch * sum(alpha**j for j in range(k + 1)) / (target(batch * (k + 1), batch) + 0.12 * k)
        for k in range(13)
    )
    assert got >= 0.97 * best


@pytest.mark.parametrize("level", [0.0, 0.12])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("target", [memory_bound, compute_bound, kinked])
def test_scores_are_used_and_what_is_promised_comes(target, batch: int, level: float) -> None:
    machine = Machine(target, level, always(0.0), scores=(0.1, 0.6, 0.95))
    policy = Goodput(machine)
    machine.run(policy, lambda _: batch, 300)
    got = machine.run(policy, lambda _: batch, 300)
    assert policy.rate == pytest.approx(got, rel=0.15)
    assert got >= 0.97 * machine.best_fixed(lambda _: batch, 600)


@pytest.mark.parametrize("found", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("target", [memory_bound, compute_bound])
def test_drafters_that_often_find_nothing(target, found: float) -> None:
    machine = Machine(target, 0.0, always(0.7), always(found), longest=8, fixed=0.01)
    got = machine.goodput(lambda _: 1, 600)
    assert got >= 0.97 * machine.best_fixed(lambda _: 1, 600)


@pytest.mark.parametrize("seed", range(3))
def test_a_server_whose_load_rises_and_falls(seed: int) -> None:
    """Drafting pays when it is quiet and not when it is full; texts differ, too."""
    r = random.Random(seed)
    loads = [r.choice([1, 2, 8, 24, 32]) for _ in range(8)]
    easy = [r.choice([0.2, 0.85]) for _ in range(32)]
    machine = Machine(kinked, 0.1, lambda step, i: easy[i])
    load = lambda seconds: loads[int(seconds) // 60 % 8]  # noqa: E731
    got, best = machine.goodput(load, 480), machine.best_fixed(load, 480)
    assert got >= 0.98 * best
    if seed != 1:  # there it is full most of the time, and not to draft is the best of all
        assert got >= best, "one length for all times and texts is not the best there is"


@pytest.mark.parametrize("fixed", [0.2, 0.4, 0.6])
def test_texts_that_differ_near_the_point_where_drafts_pay(fixed: float) -> None:
    """A small model on a CPU: a draft costs as much as a forward, and some texts are worth it."""
    r = random.Random(3)
    easy = [r.choice([0.4, 0.6, 0.75, 0.9]) for _ in range(64)]
    machine = Machine(
        lambda rows, n: 1.0 + 0.06 * rows, 0.25, lambda step, i: easy[step // 50 % 64],
        noise=0.4, fixed=fixed, longest=3, lifetime=50,
    )  # fmt: skip
    got = machine.goodput(lambda _: 1, 2000)
    assert got >= 0.97 * machine.best_fixed(lambda _: 1, 2000)


def test_a_text_that_turns_is_noticed_both_ways() -> None:
    machine = Machine(memory_bound, 0.25, lambda step, i: 0.95 if 300 <= step < 900 else 0.05)
    policy = Goodput(machine)
    seen = []
    original = policy.budgets

    def budgets(views, load):
        out = original(views, load)
        seen.append(out[0].depth)
        return out

    policy.budgets = budgets  # type: ignore[method-assign]
    machine.run(policy, lambda _: 1, 1200)
    assert np.mean(seen[200:300]) < 0.3
    assert np.mean(seen[600:900]) > 3
    assert np.mean(seen[1000:]) < 0.3


def test_probing_costs_less_than_three_percent() -> None:
    """A drafter that is never right, and slow."""
    machine = Machine(compute_bound, 0.5, always(0.0))
    plain = 1 / compute_bound(1, 1)
    assert machine.goodput(lambda _: 1, 1500) >= 0.97 * plain


def test_a_probe_pays_what_it_has_lost_and_not_what_it_should_have() -> None:
    """Expected to lose nothing, probes take half as long again as a step without drafts."""
    probes = Probes(StepTime(GivenCosts([1.0])), plain=False)
    probes.credit, probes.earned = 0.0, Probes.SHARE
    verdicts = [Verdict([], [1]) for _ in range(4)]
    records = [Record(Habits(4)) for _ in range(4)]
    views = [SeqView([1] * 4, 4, SamplingParams(), SeqRng(1)) for _ in range(4)]
    lost = 0.0
    for _ in range(4000):
        drafts = any(probes.look(views, records, [0] * 4, [4] * 4, vary=False))
        took = Timings(0.3 * drafts, 1.0 + 0.2 * drafts, rows=4, sequences=4)
        probes.observe(took, verdicts, rate=4.0)
        lost += 0.5 * drafts
    assert 0.9 * Probes.SHARE < lost / 4000 <= 1.1 * Probes.SHARE


def test_with_costs_given_the_clock_changes_nothing() -> None:
    def chosen(unit: float) -> list[list[int]]:
        policy = Goodput.build(None, target="10/10/12/20/40/80/160", draft=3.0)
        assert isinstance(policy, Goodput)
        found, original, learn = [], policy.budgets, policy.observe

        def budgets(views, load):
            out = original(views, load)
            found.append([b.depth for b in out])
            return out

        def observe(trees, verdicts, timings):
            took = unit * (1 + len(found) % 7)
            learn(trees, verdicts, replace(timings, draft=took, target=took))

        policy.budgets, policy.observe = budgets, observe  # type: ignore[method-assign]
        machine = Machine(memory_bound, 0.1, lambda step, i: 0.3 + 0.1 * i)
        machine.run(policy, lambda elapsed: 6, 400)
        return found

    assert chosen(1e-3) == chosen(7.0)
    assert len({tuple(c) for c in chosen(1.0)}) > 3


def test_choices_do_not_oscillate() -> None:
    machine = Machine(memory_bound, 0.15, always(0.7), noise=0.3)
    policy, seen = Goodput(machine), []
    original = policy.budgets

    def budgets(views, load):
        seen.append([b.depth for b in original(views, load)])
        return [Budget(1 << 30, k) for k in seen[-1]]

    policy.budgets = budgets  # type: ignore[method-assign]
    machine.run(policy, lambda _: 1, 800)
    changes = sum(a != b for a, b in itertools.pairwise(seen[100:]))
    assert changes < 50


def brute_force(gain, rows, forward, draft) -> float:
    count, most = gain.shape
    grid = np.indices((most + 1,) * count).reshape(count, -1).T
    return max(promise(list(levels), gain, rows, forward, draft) for levels in grid)


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_the_best_there_is(seed: int) -> None:
    r = np.random.default_rng(seed)
    rates = r.uniform(0.1, 0.95, 3)
    gain = rates[:, None] ** np.arange(1, 5)
    rows = np.ones((3, 4))
    slope, level = r.uniform(0.01, 0.4), r.uniform(0.0, 0.3)

    def forward(n: np.ndarray) -> np.ndarray:
        return 1 + slope * n

    def draft(levels: int, sequences: int) -> float:
        return level * levels + 0.01 * sequences

    levels, rate = allocate(gain, rows, forward, draft)
    assert rate == pytest.approx(promise(levels, gain, rows, forward, draft))
    assert rate >= brute_force(gain, rows, forward, draft) * 0.999


def test_allocation_of_nothing() -> None:
    zero = np.zeros((2, 3))
    levels, rate = allocate(zero, np.ones((2, 3)), lambda n: n, lambda k, n: 1.0)
    assert (levels, rate) == ([0, 0], 1.0)


def test_the_line_tells_fixed_time_from_time_per_level() -> None:
    line = Line()
    for x in [4] * 30:
        line.observe(x, 0.4)
    assert line.at(0) == pytest.approx(0.08), "nothing else is known: as much as a level takes"
    assert line.at(8) == pytest.approx(0.72)
    for x in [1, 2, 4, 6] * 30:
        line.observe(x, 0.3 + 0.01 * x)
    assert line.at(8) == pytest.approx(0.38, rel=0.1)
    before = line.at(4)
    line.observe(4, 100.0)
    assert line.at(4) < 2 * before, "one interruption is not the rule"


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_first_observations_may_be_accidents(first: int) -> None:
    line, tilt = Line(), Tilt()
    for i in range(6):
        accident = 20.0 if i == first else 1.0
        line.observe(2, accident)
        tilt.observe(0.5, accident)
    assert line.at(2) < 1.3
    assert tilt.at(0.5) < 1.3


def test_steps_that_draft_are_told_apart_from_those_that_do_not() -> None:
    """Whatever their rows are: the machine is the same, but a draft model was at its caches."""
    time = StepTime(Machine(lambda rows, n: 1.0, 0.1, always(0.5)))
    for step in range(60):
        rows, took = (8, 1.0) if step % 3 else (16, 1.4)
        time.observe(Timings(0.1, took, 0.0, rows, 0, 8, True), rows // 8 - 1, 8 if rows > 8 else 0)
    plain, few, many = time.forward([8, 16, 32], 0, 8)
    assert plain == pytest.approx(1.0, abs=0.05)
    assert few == pytest.approx(1.4, abs=0.1)
    assert many == pytest.approx(few, abs=0.05), "more rows are what the cost model says"


def test_another_pass_over_the_weights_is_noticed() -> None:
    """Two rows at a time, while the cost model has a straight line; what was seen once is not
    believed, and other numbers of rows are none the dearer for it."""
    straight = GivenCosts([0.9, 1.0, 1.2, 1.6, 2.4])  # 0.1 a row
    time, r = StepTime(straight), random.Random(0)
    truth = {n: 0.9 + 0.2 * ((n - 1) // 2) for n in range(1, 9)}
    for _ in range(600):
        n = r.randint(2, 7)
        took = truth[n] * r.uniform(0.85, 1.15)
        time.observe(Timings(0.1, took, 0.0, n, 0, 1, True), n - 1, 1)
    found = time.forward(range(2, 8), 0, 1)
    assert np.diff(found) == pytest.approx([0.2, 0.0, 0.2, 0.0, 0.2], abs=0.05)
    before = time.forward([12, 13], 0, 1)
    time.observe(Timings(0.1, 10.0, 0.0, 13, 0, 1, True), 12, 1)
    after = time.forward([12, 13], 0, 1)
    assert after[1] / after[0] < 1.1 * before[1] / before[0]


def test_stairs_are_climbed_where_they_end() -> None:
    """A curve that knows every other number of rows alone, and a drafter that says how sure it is:
    drafts end on the last row of a stair, and that pays."""

    def stairs(rows: int, sequences: int) -> float:
        return 1.0 + 0.5 * ((rows - 1) // 4)

    class Smooth(Machine):
        def seconds(self, rows: int, context: int = 0, sequences: int = 1) -> float:
            return 1.0 + 0.125 * (rows - 1)

    machine = Smooth(stairs, 0.01, always(0.8), scores=(0.5, 0.8, 0.95), noise=0.1)
    policy = Goodput(machine)
    machine.run(policy, lambda _: 1, 600)
    rows = collections.Counter[int]()
    observe = policy.observe

    def counted(trees, verdicts, timings) -> None:
        rows[timings.rows] += 1
        observe(trees, verdicts, timings)

    policy.observe = counted  # type: ignore[method-assign]
    machine.run(policy, lambda _: 1, 600)
    assert rows[4] + rows[8] > 0.8 * rows.total(), rows


def test_steps_are_learned_from_together_and_none_is_lost() -> None:
    """Sequences that have left in the meantime included."""
    machine = Machine(memory_bound, 0.01, always(0.7), lifetime=5)
    policy = Goodput(machine)
    judged = 0
    observe = policy.observe

    def counted(trees, verdicts, timings) -> None:
        nonlocal judged
        judged += sum(v.checked for v in verdicts)
        observe(trees, verdicts, timings)

    policy.observe = counted  # type: ignore[method-assign]
    machine.run(policy, lambda _: 3, 203)
    (habits,) = policy.habits.values()
    assert policy.lessons.heard, "in the middle of a batch"
    assert len(policy.lessons.heard) < policy.lessons.LAG
    assert habits.total < judged
    policy.lessons.learn()
    assert habits.total == judged


def test_drafts_with_distributions_are_not_held() -> None:
    """[K, V] numbers a sequence and step."""
    policy = Goodput(Machine(memory_bound, 0.01, always(0.7)))
    policy.steps = 1000
    view = SeqView([1] * 4, 4, SamplingParams(max_tokens=99), SeqRng(1))
    for q, held in ((None, 1), (torch.full((2, 5), 0.2), 0)):
        policy.budgets([view], Load(1))
        tree = TokenTree.chain([1], [2, 3], q=q)
        policy.observe([tree], [Verdict([1], [2, 3], 2)], Timings(0.1, 1.0, 0.0, 3, 0, 1, True))
        assert len(policy.lessons.heard) == held


def test_a_newcomer_does_as_the_last_one_did(monkeypatch) -> None:
    """No choice is made for it: a choice takes twenty times as long as a step without one."""
    machine = Machine(memory_bound, 0.0, always(0.9))
    policy = Goodput(machine)
    machine.run(policy, lambda _: 1, 200)
    (usual,) = policy.asked
    monkeypatch.setattr(policy, "_choose", None)
    view = SeqView([1] * 4, 4, SamplingParams(max_tokens=1 << 20), SeqRng(1))
    policy.age = 0
    assert usual > 1
    assert policy.budgets([view], Load(1))[0].depth == usual


def test_rows_of_drafts_that_are_seldom_there_cost_what_they_cost() -> None:
    machine = Machine(memory_bound, 0.0, always(0.7), always(0.2), longest=8)
    policy = Goodput(machine)
    machine.run(policy, lambda _: 1, 200)
    assert np.diff(policy.costs[1:8]) == pytest.approx(0.02, rel=0.1)


def test_a_machine_that_changes_is_not_taken_for_what_drafts_cost() -> None:
    """Busy in the beginning, as servers are, or slower and slower: drafts are not to blame."""
    busy, slower = Tilt(), Tilt()
    for step in range(30):
        busy.observe(float(step < 10), 2.0 if step < 8 else 1.0)
        slower.observe(float(step >= 15), 1.0 + step / 20)
    for tilt in (busy, slower):
        assert abs(tilt.d) < 0.25


def test_what_drafts_cost_is_not_forgotten_while_nobody_drafts() -> None:
    time = StepTime(Machine(lambda rows, n: 1.0, 0.1, always(0.5)))

    def step(rows: int, took: float) -> None:
        time.observe(Timings(0.1, took, 0.0, rows, 0, 8, True), rows // 8 - 1, 8 if rows > 8 else 0)

    for i in range(60):
        step(*((8, 1.0) if i % 3 else (16, 1.4)))
    for _ in range(500):
        step(8, 1.0)
    plain, few = time.forward([8, 16], 0, 8)
    assert plain == pytest.approx(1.0, abs=0.02)
    assert few == pytest.approx(1.4, abs=0.1)
    for i in range(300):  # it costs nothing any more, as now and then a probe shows
        step(*((8, 1.0) if i % 15 else (16, 1.0)))
    assert time.forward([16], 0, 8)[0] == pytest.approx(1.0, abs=0.1)


def test_prompts_are_read_as_often_as_sequences_leave() -> None:
    """Those that came together in the beginning will not come again."""
    policy = Goodput(Machine(memory_bound, 0.1, always(0.5)))
    views = [SeqView([1] * 4, 4, SamplingParams(max_tokens=64), SeqRng(1)) for _ in range(9)]
    policy.budgets(views[:8], Load(8))
    policy.budgets(views[:8], Load(8))
    assert policy.time.arrived == 0
    policy.budgets(views[1:], Load(8))
    assert policy.time.arrived == 1


def test_habits_know_drafts_that_end_early_and_find_nothing() -> None:
    habits = Habits(8)
    for step in range(400):
        found = step % 2
        n = 3 * found
        habits.observe(6, [1] * n, Verdict([1, 2][:n], [1] * 3, n))
    record = Record(habits)
    usual = record.curve(8)
    gain, rows = usual.gain[0], usual.rows[0]
    assert usual.found == pytest.approx(0.5, abs=0.05)
    assert rows[:3] == pytest.approx([0.5] * 3, abs=0.06)
    assert rows[3:].sum() < 0.1
    assert gain[1] > 5 * gain[2], "the third is always refused"
    for _ in range(30):
        record.observe(6, 3, Verdict([], [1], 1))
    now = record.curve(8)
    own, there = now.gain[0], now.rows[0]
    assert gain[0] / rows[0] > 0.8
    assert own[0] / there[0] < 0.5, "its own verdicts count more"


def test_trees_count_the_rows_of_every_level() -> None:
    tree = TokenTree.build([1, 2], [3, 4, 5, 6], [-1, -1, 0, 2])
    assert widths(tree) == [2, 1, 1]
    assert widths(TokenTree.context([1, 2])) == []


def test_costs_that_the_user_wrote() -> None:
    cost = GivenCosts([10, 10, 14])
    assert [cost.seconds(n) for n in (1, 2, 3, 4, 6)] == [10, 10, 12, 14, 18]
    policy = Goodput.build(None, target="10/10/10/12/14", draft=0.5)
    assert isinstance(policy, Goodput)
    for wrong in ("10/x", "0/1", "-3"):
        with pytest.raises(InputError, match="positive"):
            Goodput.build(None, target=wrong)


def test_without_costs_it_drafts_a_little_and_says_so() -> None:
    with pytest.warns(UserWarning, match="no costs"):
        policy = Goodput.build(BuildContext(None))  # type: ignore[arg-type]
    (budget,) = policy.budgets([None], Load())  # type: ignore[list-item]
    assert budget.depth == 4
    policy.observe([], [], Timings())


@pytest.mark.parametrize("options", [{"tokens": 0}, {"every": 0}, {"draft": -1.0}])
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(InputError):
        Goodput(GivenCosts([1.0]), **options)
