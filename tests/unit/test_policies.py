"""Effort policies, and the walk's treatment of dead nodes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from foretell import LLM, InputError, SamplingParams
from foretell.control.length.adaptive import Adaptive
from foretell.control.length.company import decided, learner, tried
from foretell.control.length.confidence import Confidence, refit
from foretell.control.length.entropy import Bar, Entropy, bound
from foretell.control.length.fixed import Fixed
from foretell.control.length.specdecpp import Acceptance, SpecDecPlusPlus, isotonic
from foretell.core.feedback import Verdict
from foretell.core.protocols import Budget, Draw, Load, SeqView, Timings
from foretell.core.rng import SeqRng
from foretell.core.tree import Kind, TokenTree
from foretell.drafters.trees.chain import ChainGrower
from foretell.verify.walk import follow
from helpers_model import pair


def view(draw: Draw = Draw.TOP) -> SeqView:
    return SeqView([1, 2, 3], 3, SamplingParams(), SeqRng(1), draw)


def verdict(accepted: int, tries: int) -> Verdict:
    path = list(range(1, accepted + 1))
    return Verdict(path, [0] * (accepted + 1), tries)


def test_confidence_stops_below_a_doubtful_token_only() -> None:
    (budget,) = Confidence(threshold=0.5, tokens=4).budgets([view()], Load())
    assert budget.depth == 4
    assert budget.stop is not None
    assert budget.stop([0.9, 0.49])
    assert not budget.stop([0.1, 0.5])


def test_a_threshold_outside_its_range_is_refused() -> None:
    with pytest.raises(InputError, match="outside"):
        Confidence(threshold=1.5)


def test_fixed_gives_everybody_the_same() -> None:
    budgets = Fixed(tokens=2, nodes=3).budgets([None, None], Load())  # type: ignore[list-item]
    assert [(b.depth, b.nodes, b.stop) for b in budgets] == [(2, 3, None)] * 2


class Cutting(Fixed):
    """Of three drafted tokens one is verified; of the second sequence none."""

    def trim(self, trees: list[TokenTree]) -> list[TokenTree]:
        return [t.head(min(len(t), t.n_context + (i == 0))) for i, t in enumerate(trees)]


def test_a_policy_may_leave_out_what_was_drafted() -> None:
    target, context = pair()
    params = SamplingParams(max_tokens=24, temperature=0.0)
    prompts = [[1, 2, 3], [4, 5, 6]]
    plain = LLM(target, draft="none", context=context).generate(prompts, params)
    llm = LLM(target, draft="draft-model", policy=Cutting(3), context=context)
    first, second = llm.generate(prompts, params)
    assert [first.token_ids, second.token_ids] == [o.token_ids for o in plain]
    assert first.stats.accepted > 0
    assert first.stats.drafted <= first.stats.steps
    while_both = first.stats.steps
    assert second.stats.drafted <= max(0, second.stats.steps - while_both)


def test_the_walk_never_steps_on_a_dead_node() -> None:
    """A dead node has no row, so even one that says the right token ends the walk."""
    tree = TokenTree.chain([1], [5, 6])
    tree.kind[1:] = Kind.DEAD
    verdict = follow(tree, {0: 5}.__getitem__)
    assert (verdict.path, verdict.tokens) == ([], [5])


def test_the_threshold_is_where_the_roc_cost_is_least() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2])
    good = np.array([1, 1, 1, 0, 1, 0, 0], bool)

    def cost(t: float) -> float:
        said = scores >= t
        return (said & ~good).sum() / 3 + 3 * (~said & good).sum() / 4

    assert refit(scores, good) == 0.4
    assert cost(0.4) == min(cost(t) for t in scores)
    r = np.random.default_rng(0)
    for _ in range(30):
        scores, good = r.integers(0, 6, 40) / 5, r.random(40) < 0.5
        got = refit(scores, good)
        said = {t: scores >= t for t in set(scores)}
        best = min(
            (s & ~good).sum() / (~good).sum() + 3 * (~s & good).sum() / good.sum()
            for s in said.values()
        )
        s = said[got]
        found = (s & ~good).sum() / (~good).sum() + 3 * (~s & good).sum() / good.sum()
        assert found == pytest.approx(best)


def test_one_kind_of_label_gives_no_threshold() -> None:
    assert refit(np.array([0.5, 0.6]), np.array([True, True])) is None


@pytest.mark.parametrize("on", [True, False])
def test_confidence_learns_which_scores_stand(on: bool) -> None:
    policy, one = Confidence(threshold=0.1, refit=on), view()
    r = random.Random(0)
    for _ in range(60):
        policy.budgets([one], Load())
        scores = [r.random() for _ in range(3)]
        n = next((i for i, s in enumerate(scores) if s < 0.6), 3)
        tree = TokenTree.chain([3], [4, 5, 6], score=scores)
        policy.observe([tree], [verdict(n, min(n + 1, 3))], Timings())
    (budget,) = policy.budgets([one], Load())
    assert budget.stop is not None
    assert budget.stop([0.5]) is on
    assert not budget.stop([0.7])


def test_sequences_learn_together_unless_their_drafts_decide_the_output() -> None:
    shared: dict[Draw, list] = {}
    a, b, c, d = view(), view(), view(Draw.SAMPLE), view(Draw.SAMPLE)
    first = learner(a, shared, list)
    assert learner(b, shared, list) is first
    assert learner(view(Draw.NOISE), shared, list) is not first
    assert learner(c, shared, list) is learner(c, shared, list)
    assert learner(c, shared, list) is not learner(d, shared, list)


def test_verdicts_find_their_sequences_past_those_that_read_their_prompt() -> None:
    trees = [TokenTree.context([1]), TokenTree.context([1, 2]), TokenTree.context([3])]
    verdicts = [Verdict([], [5]), Verdict([], []), Verdict([], [6])]
    views = [view(), view()]
    got = list(decided(views, trees, verdicts))
    assert [t for _, t, _ in got] == [trees[0], trees[2]]
    assert [v for v, _, _ in got] == views


def test_what_was_tried_of_a_tree() -> None:
    tree = TokenTree.build([1], [2, 3, 4, 5, 6], [-1, -1, 1, 1, 2])
    assert list(tried(tree, Verdict([2, 4], [3, 5, 9], 2))) == [
        (1, False), (2, True), (3, False), (4, True),
    ]  # fmt: skip
    assert list(tried(tree, Verdict([], [9], 1))) == [(1, False), (2, False)]
    assert list(tried(tree, Verdict([], [9], 0))) == []


def test_isotonic_regression() -> None:
    assert isotonic([1, 3, 2, 5], [1, 1, 1, 1]) == [1, 2.5, 2.5, 5]
    assert isotonic([3, 1], [1, 3]) == [1.5, 1.5]
    r = np.random.default_rng(1)
    for _ in range(20):
        got = isotonic(r.random(8).tolist(), r.random(8).tolist())
        assert got == sorted(got)


def test_acceptance_is_calibrated_from_verdicts() -> None:
    chance, r = Acceptance(), random.Random(0)
    for _ in range(1500):
        s = r.random()
        chance.observe([(s, r.random() < s * s)])
    for s in (0.25, 0.55, 0.85):
        assert chance(s) == pytest.approx(s * s, abs=0.12)
    few = Acceptance()
    few.observe([(0.96, False)] * 20)
    assert few.map == sorted(few.map), "a higher score never means less"


def test_specdecpp_stops_when_a_refusal_is_probable() -> None:
    (budget,) = SpecDecPlusPlus(threshold=0.4, tokens=9).budgets([view()], Load())
    chance, stop = Acceptance(), budget.stop
    assert stop is not None
    for scores in ([0.97], [0.7], [0.85, 0.85], [0.85, 0.85, 0.85, 0.85], [0.05]):
        want = math.prod(map(chance, scores)) < 0.6
        assert stop(scores) is want
    assert stop([0.05])
    assert not stop([0.97])


@pytest.mark.parametrize("level", [0.1, 0.3])
def test_specdecpp_beats_every_fixed_length_on_a_mixed_text(level: float) -> None:
    """Runs of easy and of hard tokens; the drafter's score is a blurred, over-confident guess."""

    def rate(policy) -> float:
        r, one = random.Random(7), view()
        emitted = seconds = 0.0
        position = 0
        for _ in range(2500):
            (budget,) = policy.budgets([one], Load())
            scores, hits = [], []
            for j in range(min(budget.depth, 16)):
                p = 0.97 if (position + j) // 12 % 2 else 0.35
                scores.append(min(1.0, max(0.0, p**0.5 + r.gauss(0, 0.05))))
                hits.append(r.random() < p)
                if budget.stop is not None and budget.stop(scores):
                    break
            n = next((i for i, hit in enumerate(hits) if not hit), len(hits))
            tree = TokenTree.chain([3], [4] * len(hits), score=scores)
            policy.observe([tree], [verdict(n, min(n + 1, len(hits)))], Timings())
            emitted, seconds = emitted + n + 1, seconds + 1 + level * len(hits)
            position += n + 1
        return emitted / seconds

    threshold = 0.7 if level < 0.2 else 0.5
    got = rate(SpecDecPlusPlus(threshold=threshold))
    assert got > 1.05 * max(rate(Fixed(k)) for k in (1, 2, 3, 4, 6, 8))


def test_the_bound_of_an_entropy() -> None:
    assert bound(0.0, 0.2) == 1.0
    assert bound(1.25, 0.2) == pytest.approx(0.5)


def test_entropy_sees_the_distribution_and_not_the_token() -> None:
    """An improbable token of a sharp distribution goes on; any token of a flat one does not."""
    (budget,) = Entropy(threshold=0.5, gamma=0.2, adapt=False).budgets([view()], Load())
    assert budget.stop is None
    assert budget.unsure is not None
    assert budget.unsure([0.0, 2.0])
    assert not budget.unsure([2.0, 0.0]), "the last distribution counts"
    sharp, flat = torch.tensor([[9.0, 0, 0, 0]]), torch.zeros(1, 4)
    for draw in (Draw.TOP, Draw.SAMPLE, Draw.NOISE):
        for logits, goes_on in ((sharp, True), (flat, False)):
            grower = ChainGrower(view(draw), Budget(9, 9, unsure=budget.unsure))
            grower.expand(logits)
            assert (grower.frontier() != []) is goes_on
            assert len(grower.tokens) == 1, "the token stays either way"
            h = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
            assert grower.entropies == [pytest.approx(float(h), abs=1e-6)]
    assert Budget(9, 9, unsure=budget.unsure).clamp(nodes=3, depth=2).unsure is budget.unsure


def test_the_bar_rises_while_drafts_are_refused_and_falls_when_they_stand() -> None:
    bar = Bar(0.5)
    for _ in range(50):
        bar.observe(4, 1)
    high = bar.value
    assert 0.5 < high <= 0.5 + 50 * 0.01
    for _ in range(100):
        bar.observe(4, 4)
    assert bar.value < high
    for _ in range(5000):
        bar.observe(4, 4)
    assert bar.value == 0.0


def test_adaptive_follows_what_is_accepted() -> None:
    policy, one = Adaptive(tokens=20, start=4), view()
    seen = []
    for step in range(120):
        (budget,) = policy.budgets([one], Load())
        k = budget.depth
        seen.append(k)
        n = min(k, 12 if step < 60 else 1)
        tree = TokenTree.chain([3], [4] * k)
        policy.observe([tree], [verdict(n, min(n + 1, k))], Timings())
    assert 10 <= seen[59] <= 16
    assert seen[119] == 2, "one that is accepted, and one more"
    assert max(seen) <= 20


def test_adaptive_does_not_outgrow_a_drafter_that_ends_early() -> None:
    policy, one = Adaptive(tokens=30, start=4), view()
    for _ in range(60):
        policy.budgets([one], Load())
        policy.observe([TokenTree.chain([3], [4] * 3)], [verdict(3, 3)], Timings())
    assert policy.budgets([one], Load())[0].depth == 5
    policy.observe([TokenTree.context([3])], [verdict(0, 0)], Timings())
    assert policy.budgets([one], Load())[0].depth == 5, "no draft says nothing"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Entropy(threshold=2), lambda: Entropy(gamma=0), lambda: SpecDecPlusPlus(-0.1),
        lambda: Adaptive(start=0), lambda: Adaptive(rate=0), lambda: Adaptive(step=0),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize("policy", ["confidence", "entropy:adapt=true", "adaptive", "specdec++"])
def test_under_rejection_a_seed_means_the_same_in_any_company(policy: str) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=11)
    prompts = [[1, 2, 3, 1, 2], [7], [4, 4, 1]]

    def run(some: list[list[int]]) -> list[list[int]]:
        target, context = pair()
        llm = LLM(
            target,
            draft="draft-model:tokens=4",
            verify="rejection",
            policy=policy,
            context=context,
        )
        return [o.token_ids for o in llm.generate(some, params)]

    assert run(prompts) == [run([p])[0] for p in prompts]


def test_policies_stop_drafts_through_the_engine() -> None:
    """The same text from fewer drafted tokens."""
    params, counts = SamplingParams(max_tokens=60), {}
    for policy in ("fixed", "entropy:threshold=0.7,adapt=false", "specdec++:threshold=0.3"):
        target, context = pair()
        llm = LLM(target, draft="draft-model:tokens=6", policy=policy, context=context)
        out = llm.generate([[1, 2, 3]], params)[0]
        counts[policy] = out.stats.drafted, out.token_ids
    (most, text), *others = counts.values()
    assert all(n < most and t == text for n, t in others)
