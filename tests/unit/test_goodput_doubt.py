"""goodput and drafters that say how sure they are: what their scores are worth, and what not."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from foretell.control.length.confidence import Confidence
from foretell.control.length.fixed import Fixed
from foretell.control.length.goodput.cut import cut
from foretell.control.length.goodput.doubt import EDGES, FREE, Doubt, judged
from foretell.control.length.goodput.habits import Habits
from foretell.control.length.goodput.policy import Goodput
from foretell.control.length.goodput.prices import Prices, prices
from foretell.control.length.goodput.records import Record, curves
from foretell.core.feedback import Verdict
from foretell.core.params import SamplingParams
from foretell.core.protocols import Budget, Load, SeqView, Timings
from foretell.core.rng import SeqRng
from foretell.core.rows import peak
from foretell.core.stop import PathStop, chances
from foretell.core.tree import TokenTree
from foretell.drafters.draft_model import DraftModel
from foretell.models.toy import ToyModel


def chain(scores: list[float]) -> TokenTree:
    return TokenTree.chain([1, 2], [3] * len(scores), score=scores)


def verdict(accepted: int, drafted: int) -> Verdict:
    path = list(range(2, 2 + accepted))
    return Verdict(path, [3] * (accepted + 1), min(accepted + 1, drafted))


def taught(low: float, high: float, rounds: int = 400) -> Doubt:
    """Scores of 0.05 are right that often, those of 0.75 so often; they are equally frequent."""
    doubt, r = Doubt(), random.Random(1)
    for _ in range(rounds):
        for score, rate in ((0.05, low), (0.75, high)):
            doubt.saw([score])
            doubt.observe(chain([score]), verdict(int(r.random() < rate), 1))
    return doubt


def test_rates_are_what_verdicts_showed_and_not_what_scores_say() -> None:
    rates = taught(low=0.6, high=0.3).rates()
    assert len(rates) == len(EDGES) + 1
    assert rates[2] == pytest.approx(0.6, abs=0.08)
    assert rates[12] == pytest.approx(0.3, abs=0.08)
    assert rates[0] == pytest.approx(0.45, abs=0.06), "never seen: as the mean"


def test_old_verdicts_fade_and_counts_stay_finite() -> None:
    doubt = taught(low=0.9, high=0.9, rounds=30)
    for _ in range(24_000):
        doubt.saw([0.05, 0.05])
        doubt.observe(chain([0.05]), verdict(0, 1))
    assert doubt.rates()[2] < 0.02
    assert doubt.weight <= 1e9
    assert max(*doubt.tried, *doubt.first, *doubt.later) < 1e12
    for _ in range(4_000):
        doubt.saw([0.75, 0.75])
        doubt.observe(chain([0.75]), verdict(1, 1))
    assert [share[12] for share in doubt.shares()] == pytest.approx([1.0, 1.0], abs=0.03)


def worth(doubt: Doubt, chance: float, row: float) -> float:
    """What one token more is worth behind a path."""
    rates = doubt.rates()
    return sum(max(0.0, chance * rates[i] - row) for i in (2, 12)) / 2


def test_a_draft_ends_where_going_on_is_worth_less_than_it_costs() -> None:
    doubt = taught(low=0.2, high=0.9)
    rates = doubt.rates()
    sure, unsure = rates[12], rates[12] * rates[2]
    for row in (0.0, 0.3):
        one, two = worth(doubt, sure, row), worth(doubt, unsure, row)
        stop = doubt.stop(Prices(row, [0.97 * one, two + 0.01]))
        assert not stop([0.75]), "worth its price"
        assert not stop.said
        assert stop([0.75, 0.05])
        assert stop.said
        dear = doubt.stop(Prices(row, [1.03 * one]))
        assert dear([0.75])
    free = doubt.stop(Prices(0.0, [0.0]))
    assert not free([0.05])
    assert not free([0.75, 0.05]), "no price, no doubt: the last level"


def test_nothing_is_doubted_before_there_are_enough_verdicts() -> None:
    doubt = Doubt()
    for _ in range(int(Doubt.ENOUGH) - 1):
        doubt.saw([0.5])
        doubt.observe(chain([0.5]), verdict(0, 1))
    assert not doubt.stop(Prices(0.0, [9.0]))([0.5])
    doubt.observe(chain([0.5]), verdict(0, 1))
    assert doubt.stop(Prices(0.0, [9.0]))([0.5])
    assert not doubt.stop(Prices(0.9, [FREE / 2]))([0.5]), "looking would cost more than drafting"


def test_drafters_without_scores_teach_nothing() -> None:
    doubt = Doubt()
    doubt.observe(TokenTree.chain([1], [2, 3]), verdict(1, 2))
    assert doubt.total == 0


def test_which_nodes_of_chains_and_trees_were_judged() -> None:
    assert list(judged(chain([0.5] * 4), verdict(2, 4))) == [(2, True), (3, True), (4, False)]
    assert list(judged(chain([0.5] * 2), verdict(2, 2))) == [(2, True), (3, True)]
    tree = TokenTree.build([1], [3, 4, 5], [-1, -1, 1], score=[0.5] * 3)
    assert list(judged(tree, Verdict([2], [4, 9], 2))) == [(1, False), (2, True), (3, False)]


def test_prices_are_seconds_in_tokens() -> None:
    """Rows take 1, then 3 seconds each; levels of drafting 3; four tokens a second. A level that
    nobody gets to is paid by one."""
    drafted = np.array([2.0, 1.5, 0.2])

    def forward(n: np.ndarray) -> np.ndarray:
        return n + 2 * np.maximum(0.0, n - 6)

    seconds = np.array([3.0, 6.0, 9.0])
    few = prices(2, np.array([1.0, 1.0, 0.0]), drafted, forward, seconds, 4.0)
    assert few.row == pytest.approx(1 * 4)
    assert few.draft == pytest.approx([3 / 1.5 * 4, 3 * 4])
    assert prices(2, np.array([4.0, 2.0, 0.0]), drafted, forward, seconds, 4.0).row == 3 * 4
    assert prices(2, np.array([0.0, 0.0, 0.0]), drafted, forward, seconds, 4.0).row == 1 * 4


@pytest.mark.parametrize("row", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("price", [[0.0] * 3, [0.3, 0.2, 0.1], [0.05, 0.2, 0.4], [0.1, 0.5]])
def test_drafts_are_foreseen(price: list[float], row: float) -> None:
    """Against all drafts that there can be, one by one."""
    doubt = taught(low=0.25, high=0.87)
    rates, stop = doubt.rates(), doubt.stop(Prices(row, price))
    assert stop is not None
    drafted, kept, gain = ([0.0] * 4 for _ in range(3))
    for level in range(1, 5 if len(price) == 3 else 4):
        for draft in itertools.product((0.05, 0.75), repeat=level):
            if not any(stop(draft[:n]) for n in range(1, level)):
                chance = chances(EDGES, rates, draft)[-1]
                drafted[level - 1] += 0.5**level
                kept[level - 1] += 0.5**level * (chance >= row)
                gain[level - 1] += 0.5**level * chance * (chance >= row)
    found = doubt.outlook(Prices(row, price), 4)
    assert found.drafted == pytest.approx(drafted, abs=2e-3)
    assert found.kept == pytest.approx(kept, abs=2e-3)
    assert found.gain == pytest.approx(gain, rel=0.07, abs=2e-3)


def test_the_first_scores_of_drafts_are_counted_apart() -> None:
    """Half of the drafts begin with a doubt; behind them there is none."""
    doubt = Doubt()
    for _ in range(300):
        for scores, right in (([0.75, 0.75], 2), ([0.05, 0.75], 0)):
            doubt.saw(scores)
            doubt.observe(chain(scores), verdict(right, 2))
    rates = doubt.rates()
    gain = doubt.outlook(Prices(0.0, [0.0, 0.0]), 3).gain
    assert gain[0] == pytest.approx((rates[2] + rates[12]) / 2, rel=0.02)
    assert gain[1] / gain[0] == pytest.approx(rates[12], rel=0.05)


def test_what_a_doubt_would_bring_is_known_before_it_was_tried() -> None:
    """Nobody ever went beyond the first level, and doubted tokens are not worth their rows."""
    doubt, habits = taught(low=0.1, high=0.95), Habits(4)
    for _ in range(100):
        habits.observe(1, [1], verdict(1, 1))
    habits.doubt = doubt
    found = curves([Record(habits)], 4, Prices(0.4, [0.1] * 3), hope=False)
    assert found.rows[0, :2] == pytest.approx([0.5, 0.25], abs=0.03)
    assert found.drafted[0, :2] == pytest.approx([1.0, 0.5], abs=0.03)
    assert found.gain[0, 1] / found.rows[0, 1] > 0.8
    whole = curves([Record(habits)], 4, hope=False)
    assert whole.rows[0, 0] == whole.drafted[0, 0] == pytest.approx(1.0, abs=0.01)


def test_levels_that_are_left_out_where_they_would_fail_cost_no_tokens() -> None:
    """A drafter that ends at every doubt: half of its first tokens are right, and only behind those
    there is a second one, which is always right."""
    habits = Habits(4)
    for step in range(600):
        deep = 1 + step % 2
        accepted = 2 if deep == 2 else 0
        habits.observe(4, [1] * deep, Verdict([1] * accepted, [1], min(accepted + 1, deep)))
    usual = habits.read()
    assert usual.there[1] == pytest.approx(0.5, abs=0.02)
    assert usual.right[1] == pytest.approx(1.0, abs=0.02)
    found = Record(habits).curve(4)
    gain, rows = found.gain[0], found.rows[0]
    assert gain[0] == pytest.approx(0.5, abs=0.1)
    assert gain[1] == pytest.approx(gain[0], rel=0.05)
    assert rows[:2] == pytest.approx([1.0, 0.5], abs=0.03)
    assert gain[2] < 0.05


def cutting(row: float) -> Goodput:
    """A policy that knows scores of 0.05 to be right seldom, and those of 0.75 mostly."""
    policy = Goodput(Talkative(0.2, 0.9))
    policy.budgets([view_of()], Load())
    policy.views[0].effort.habits.doubt = taught(low=0.2, high=0.9)
    policy.costs, policy.rate = [row * n for n in range(20)], 1.0
    policy.steps = Goodput.WHOLE + 1
    return policy


def view_of() -> SeqView:
    return SeqView([1] * 4, 4, SamplingParams(max_tokens=64), SeqRng(1))


def test_what_is_not_worth_a_row_is_not_verified() -> None:
    policy, draft = cutting(0.5), chain([0.75, 0.75, 0.05, 0.75])
    (tree,) = policy.trim([draft])
    assert len(tree) == tree.n_context + 2
    for name in ("tokens", "parent", "kind", "depth", "score"):
        assert (getattr(tree, name) == getattr(draft, name)[: len(tree)]).all()
    assert policy.drafts == [draft]
    (none,) = policy.trim([chain([0.05, 0.75])])
    assert len(none) == none.n_context
    (cheap,) = cutting(0.01).trim([draft])
    assert cheap is draft


def test_drafts_are_cut_together_by_what_rows_really_cost() -> None:
    """Rows come by fours, and the contexts (two rows each) leave room for three: the third token of
    the surer draft is worth a row, but not four."""
    policy = cutting(0.5)
    policy.costs = [math.ceil((n + 1) / 4) for n in range(20)]
    policy.views = policy.views * 2
    sure, unsure = chain([0.75, 0.75, 0.75]), chain([0.75, 0.05])
    assert [len(t) for t in policy.trim([sure, unsure])] == [len(sure) - 1, len(unsure) - 1]
    policy.costs = [math.ceil(n / 16) for n in range(20)]
    assert policy.trim([sure, unsure]) == [sure, unsure], "what costs nothing more stays"


def test_rows_are_counted_from_those_that_are_there_anyway() -> None:
    """Four rows are free, and the context has them; beyond the list rows cost what its last do."""
    draft, paths = TokenTree.chain([1] * 4, [2, 3], score=[0.9, 0.9]), [[0.9, 0.8]]
    free, last = [0.0] * 5, [0.0, 5.0, 10.0]
    for costs in ([*free, 5.0, 10.0], last):
        assert [len(t) for t in cut([draft], paths, costs, 1.0)] == [4]
    assert cut([draft], paths, [*free, 0.1, 0.2], 1.0) == [draft]


def test_what_was_cut_was_found() -> None:
    policy = cutting(0.5)
    policy.asked, policy.stops = [1], [None]
    (left,) = policy.trim([chain([0.05])])
    for _ in range(30):
        policy.observe([left], [verdict(0, 0)], Timings(0.1, 1.0, 0.0, 2, 0, 1, True))
    assert policy.views[0].effort.curve(4).found[0] > 0.9


def test_some_drafts_are_verified_whole_to_hear_of_what_is_doubted() -> None:
    policy, draft = cutting(0.5), chain([0.05])
    policy.steps = Goodput.WHOLE
    assert policy.trim([draft])[0] is draft


def test_drafts_of_a_probe_are_verified_whole() -> None:
    """Or else what is believed of their rows would keep them from ever showing it."""
    policy, draft = cutting(0.5), chain([0.05])
    assert policy.trim([draft])[0] is not draft
    policy.probes.left = 1
    assert policy.trim([draft])[0] is draft


def test_tokens_that_were_drawn_are_never_cut_nor_trees_nor_what_has_no_scores() -> None:
    """Leaving a drawn token out because of its own chance would change the law of the output."""
    policy = cutting(0.5)
    drawn = TokenTree.chain([1], [2], q=torch.ones(1, 4) / 4, score=[0.05])
    tree = TokenTree.build([1], [3, 4], [-1, -1], score=[0.05, 0.05])
    plain, nothing = TokenTree.chain([1], [2]), TokenTree.context([1])
    for draft in (drawn, tree, plain, nothing):
        assert policy.trim([draft])[0] is draft


def test_ends_that_the_policy_asked_for_are_not_held_against_the_drafter() -> None:
    policy = Goodput(Talkative(0.2, 0.9))
    for _ in range(40):
        policy.budgets([view_of()], Load())
        policy.stops = [PathStop(EDGES, (0.5,) * 16, [2.0])]
        assert policy.stops[0]([0.05])
        policy.asked = [4]
        policy.observe([chain([0.05])], [verdict(1, 1)], Timings(0.1, 1.0, 0.0, 2, 0, 1, True))
    (habits,) = policy.habits.values()
    assert habits.read().there[1] > 0.9


class Talkative:
    """A machine and a drafter whose scores tell much, though not what they say: tokens scored 0.1
    are right at `low`, those scored 0.3 at `high`."""

    def __init__(self, low: float, high: float) -> None:
        self.rate = {0.1: low, 0.3: high}

    def seconds(self, rows: int, context: int = 0, sequences: int = 1) -> float:
        return 1.0 + 0.05 * rows

    def observe(self, rows: int, context: int, sequences: int, seconds: float) -> None:
        pass

    def run(self, policy, batch: int, steps: int = 1500, seed: int = 1) -> float:
        """Tokens per second."""
        r = random.Random(seed)
        views = [
            SeqView([1] * 4, 4, SamplingParams(max_tokens=1 << 20), SeqRng(1)) for _ in range(batch)
        ]
        emitted, elapsed = 0, 0.0
        for _ in range(steps):
            trees, verdicts, lucks, deepest = [], [], [], 0
            for view, budget in zip(views, policy.budgets(views, Load(batch)), strict=True):
                scores: list[float] = []
                while len(scores) < min(budget.depth, 8):
                    scores.append(r.choice([0.1, 0.3]))
                    if budget.stop is not None and budget.stop(scores):
                        break
                lucks.append([r.random() < self.rate[s] for s in scores])
                trees.append(TokenTree.chain(view.tokens[-1:], [1] * len(scores), score=scores))
                deepest = max(deepest, len(scores))
            if deepest and hasattr(policy, "trim"):
                trees = policy.trim(trees)
            for view, tree, luck in zip(views, trees, lucks, strict=True):
                kept = luck[: len(tree) - 1]
                right = kept.index(False) if False in kept else len(kept)
                path = list(range(1, right + 1))
                verdicts.append(Verdict(path, [1] * (right + 1), min(right + 1, len(kept))))
                view.tokens += [1] * (right + 1)
                emitted += right + 1
            rows = sum(map(len, trees))
            draft, target = 0.05 * deepest, self.seconds(rows)
            elapsed += draft + target
            policy.observe(trees, verdicts, Timings(draft, target, 0.0, rows, 0, batch, True))
        return emitted / elapsed


class Always:
    def __init__(self, k: int) -> None:
        self.budget = Budget(1 << 30 if k else 0, k)

    def budgets(self, views, load):
        return [self.budget] * len(views)

    def observe(self, trees, verdicts, timings):
        pass


@pytest.mark.parametrize("batch", [1, 4])
def test_better_than_every_fixed_length_where_scores_tell_something(batch: int) -> None:
    machine = Talkative(low=0.25, high=0.95)
    best = max(machine.run(Always(k), batch) for k in range(9))
    got = [machine.run(Goodput(machine), batch, seed=seed) for seed in range(3)]
    assert np.mean(got) >= 1.02 * best


@pytest.mark.parametrize("batch", [1, 4])
def test_no_worse_where_they_tell_nothing(batch: int) -> None:
    machine = Talkative(low=0.7, high=0.7)
    best = max(machine.run(Always(k), batch) for k in range(9))
    assert machine.run(Goodput(machine), batch) >= 0.97 * best


# -- drafters


def levels(drafter: DraftModel, policy) -> int:
    view = SeqView([1, 2, 3], 3, SamplingParams(max_tokens=64), SeqRng(1))
    (budget,) = policy.budgets([view], Load())
    budget = budget.clamp(nodes=64, depth=60)  # as the engine does
    (tree,) = drafter.propose([drafter.begin(view)], [view], [budget])
    return len(tree) - tree.n_context


def test_a_policy_that_says_how_deep_is_obeyed_and_one_that_does_not_gets_the_usual() -> None:
    toy = ToyModel()
    drafter = DraftModel(toy, toy.spec.vocab)
    assert levels(drafter, Fixed()) == 3
    assert [levels(drafter, Fixed(k)) for k in (1, 2, 5, 8, 20)] == [1, 2, 5, 8, 8]
    assert levels(drafter, Confidence(threshold=0.0, refit=False)) == 8
    own = DraftModel(toy, toy.spec.vocab, tokens=4)
    assert [levels(own, p) for p in (Fixed(), Fixed(2), Fixed(8))] == [4, 2, 4]


def test_a_chain_is_scored_when_somebody_asks() -> None:
    toy = ToyModel()
    drafter = DraftModel(toy, toy.spec.vocab)
    view = SeqView([1, 2, 3], 3, SamplingParams(max_tokens=64), SeqRng(1))
    asked: list[list[float]] = []

    def stop(scores) -> bool:
        asked.append(list(scores))
        return False

    (tree,) = drafter.propose([drafter.begin(view)], [view], [Budget(9, 4, stop=stop)])
    prefix = list(view.tokens)
    first = tree.n_context
    for score, token in zip(tree.score[first:], tree.tokens[first:], strict=True):
        q = toy.next_probs(prefix)
        assert int(q.argmax()) == token
        assert score == pytest.approx(float(q.max()), rel=1e-4)
        prefix.append(int(token))
    assert asked[-1] == tree.score[tree.n_context : -1].tolist()


def test_the_peak_of_a_row() -> None:
    row = torch.tensor([[0.0, 3.0, -40.0, 3.0]])
    column, share = peak(row)
    assert column == 1
    assert share == pytest.approx(float(row.softmax(-1)[0, 1]))
    assert peak(torch.tensor([[1e4, -1e4]])) == (0, 1.0)
