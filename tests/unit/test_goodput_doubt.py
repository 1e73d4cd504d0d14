"""goodput and drafters that say how sure they are: what their scores are worth, and what not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from foretell.control.length.confidence import Confidence
from foretell.control.length.fixed import Fixed
from foretell.control.length.goodput.doubt import EDGES, Doubt, judged, prices
from foretell.control.length.goodput.habits import Habits
from foretell.control.length.goodput.policy import Goodput
from foretell.control.length.goodput.records import Record
from foretell.core.feedback import Verdict
from foretell.core.params import SamplingParams
from foretell.core.protocols import Budget, Load, SeqView, Timings
from foretell.core.rng import SeqRng
from foretell.core.rows import peak
from foretell.core.tree import TokenTree
from foretell.drafters.draft_model import DraftModel
from foretell.models.toy import ToyModel


def chain(scores: list[float]) -> TokenTree:
    return TokenTree.chain([1, 2], [3] * len(scores), score=scores)


def verdict(accepted: int, drafted: int) -> Verdict:
    path = list(range(2, 2 + accepted))
    return Verdict(path, [3] * (accepted + 1), min(accepted + 1, drafted))


def taught(low: float, high: float, rounds: int = 400) -> Doubt:
    """Scores of 0.05 are right that often, those of 0.75 so often."""
    doubt, r = Doubt(), random.Random(1)
    for _ in range(rounds):
        for score, rate in ((0.05, low), (0.75, high)):
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
    for _ in range(12_000):
        doubt.observe(chain([0.05]), verdict(0, 1))
    assert doubt.rates()[2] < 0.02
    assert doubt.weight <= 1e9
    assert max(doubt.tried) < 1e12


def test_a_draft_ends_where_going_on_is_worth_less_than_it_costs() -> None:
    doubt = taught(low=0.2, high=0.9)
    rates = doubt.rates()
    one, two = rates[12] * doubt.mean, rates[12] * rates[2] * doubt.mean
    stop = doubt.end([one - 0.01, two + 0.01])
    assert not stop([0.75]), "worth its price"
    assert stop([0.75, 0.05])
    assert doubt.end([one + 0.01])([0.75])
    assert not doubt.end([0.0])([0.05])
    assert not stop([0.75, 0.05, 0.05]), "no price, no doubt: the last level"


def test_nothing_is_doubted_before_there_are_enough_verdicts() -> None:
    doubt = Doubt()
    for _ in range(int(Doubt.ENOUGH) - 1):
        doubt.observe(chain([0.5]), verdict(0, 1))
    assert not doubt.end([9.0])([0.5])
    doubt.observe(chain([0.5]), verdict(0, 1))
    assert doubt.end([9.0])([0.5])


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
    """Rows take 1, then 2 seconds each; levels of drafting 3; four tokens a second."""
    rows = np.array([[1.0, 1.0, 0.5], [1.0, 1.0, 0.5]])

    def forward(n: np.ndarray) -> np.ndarray:
        return n + np.maximum(0.0, n - 6)

    found = prices(2, rows, forward, np.array([3.0, 6.0, 9.0]), 4.0)
    assert found == pytest.approx([(1 + 3 / 2) * 4, (2 + 3 / 1) * 4])


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
    gain, rows, _ = Record(habits).curve(4)
    assert gain[0] == pytest.approx(0.5, abs=0.1)
    assert gain[1] == pytest.approx(gain[0], rel=0.05)
    assert rows[:2] == pytest.approx([1.0, 0.5], abs=0.03)
    assert gain[2] < 0.05


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
            trees, verdicts, deepest = [], [], 0
            for view, budget in zip(views, policy.budgets(views, Load(batch)), strict=True):
                scores: list[float] = []
                while len(scores) < min(budget.depth, 8):
                    scores.append(r.choice([0.1, 0.3]))
                    if budget.stop is not None and budget.stop(scores):
                        break
                right = 0
                while right < len(scores) and r.random() < self.rate[scores[right]]:
                    right += 1
                trees.append(TokenTree.chain(view.tokens[-1:], [1] * len(scores), score=scores))
                path = list(range(1, right + 1))
                verdicts.append(Verdict(path, [1] * (right + 1), min(right + 1, len(scores))))
                view.tokens += [1] * (right + 1)
                emitted += right + 1
                deepest = max(deepest, len(scores))
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
