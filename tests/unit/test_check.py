"""The mathematics of `foretell check`, without a model, and its tests on a toy model."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from scipy import stats

from foretell.core.feedback import Verdict
from foretell.core.params import SamplingParams
from foretell.core.protocols import Draw, Draws, Promise, TargetRows
from foretell.core.tree import TokenTree
from foretell.drafters.draft_model import DraftModel
from foretell.engine.llm import LLM
from foretell.lab.check import equality, statistics
from foretell.lab.check.distribution import joint_law, sample
from foretell.lab.check.run import Settings, run_check
from foretell.models.toy import ToyModel
from foretell.verify.rejection import Rejection


@pytest.mark.parametrize("df", [1, 2, 7, 60, 500])
@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.0, 1.1, 2.0, 4.0])
def test_chi_square_tail_agrees_with_scipy(df: int, ratio: float) -> None:
    x = df * ratio
    assert statistics.chi2_sf(x, df) == pytest.approx(stats.chi2.sf(x, df), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("df", [1, 12, 63, 400])
@pytest.mark.parametrize("nc", [0.0, 0.5, 30.0, 200.0])
def test_noncentral_tail_agrees_with_scipy(df: int, nc: float) -> None:
    for x in (df * 0.5, df + nc, 2 * (df + nc)):
        want = stats.ncx2.sf(x, df, nc) if nc else stats.chi2.sf(x, df)
        got = statistics.noncentral_chi2_sf(x, df, nc)
        assert got == pytest.approx(want, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("alpha", [0.05, 1e-4, 1e-8])
def test_critical_value_inverts_the_tail(alpha: float) -> None:
    got = statistics.chi2_critical(alpha, 63)
    assert got == pytest.approx(stats.chi2.isf(alpha, 63), rel=1e-9)


@pytest.mark.stat
def test_stated_power_is_what_the_test_has() -> None:
    """Laws at the stated distance, of the shape that is hardest to see, are found as promised."""
    n, cells, rng = 2000, 50, random.Random(5)
    delta = statistics.detectable_tv(n, cells - 1, 1e-3, 0.9)
    # The bound is tight where the deviation is proportional to p: half the cells up, half down.
    p = [1 / cells] * cells
    wrong = [(1 + 2 * delta) / cells] * (cells // 2) + [(1 - 2 * delta) / cells] * (cells // 2)
    expected = dict(enumerate(p))
    found = sum(
        not statistics.goodness_of_fit(
            Counter(rng.choices(range(cells), wrong, k=n)), expected, alpha=1e-3, power=0.9
        ).passed
        for _ in range(200)
    )
    assert 165 <= found <= 195  # 180 expected


def test_fit_of_the_right_law_passes_and_of_a_wrong_one_fails() -> None:
    rng = random.Random(1)
    law = {k: w / 36 for k, w in enumerate([1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1])}
    right = Counter(rng.choices(list(law), list(law.values()), k=5000))
    wrong = Counter(rng.choices(list(law), k=5000))
    good, bad = (statistics.goodness_of_fit(c, law) for c in (right, wrong))
    assert good.passed
    assert good.p_value > 0.01
    assert good.tv == pytest.approx(good.tv_noise, rel=1.0)
    observed = [right[k] for k in law]
    reference = stats.chisquare(observed, [5000 * p for p in law.values()])
    assert good.statistic == pytest.approx(reference.statistic)
    assert good.p_value == pytest.approx(reference.pvalue)
    assert not bad.passed


def test_an_impossible_draw_fails_and_a_certain_law_passes() -> None:
    assert not statistics.goodness_of_fit({"a": 999, "b": 1}, {"a": 1.0}).passed
    assert statistics.goodness_of_fit({"a": 1000}, {"a": 1.0}).passed


def test_pooled_cells_expect_five_and_lose_nothing() -> None:
    pairs = [(k % 3, 0.4 * k) for k in range(40)]
    cells = statistics.pool(pairs)
    assert all(e >= 5 for _, e in cells)
    assert sum(o for o, _ in cells) == sum(o for o, _ in pairs)
    assert sum(e for _, e in cells) == pytest.approx(sum(e for _, e in pairs))
    assert statistics.pool([(1, 0.5), (2, 0.7)]) == [(3, pytest.approx(1.2))]


@pytest.mark.parametrize(
    ("a", "b", "at"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0)],
)
def test_first_difference(a: list[int], b: list[int], at: int | None) -> None:
    assert equality.first_difference(a, b) == at


def test_a_near_tie_is_explained_and_a_wide_gap_is_not() -> None:
    logits = torch.tensor([1.0, 5.0, 5.0 - 1e-5, 3.0])
    tolerance = equality.tolerance_of(5e-6, logits)
    assert tolerance == pytest.approx(2e-5)
    tie = equality.explain(0, 3, 1, 2, logits, tolerance)
    assert tie.near_tie
    assert tie.best == (1, 2)
    assert tie.margin == pytest.approx(1e-5, rel=0.1)
    assert not equality.explain(0, 3, 1, 3, logits, tolerance).near_tie  # not one of the top 2
    assert not equality.explain(0, 3, 1, None, logits, tolerance).near_tie  # ended early
    assert not equality.explain(0, 3, 1, 2, logits, 1e-6).near_tie
    assert "near-tie" in tie.sentence()


def test_tolerance_never_falls_below_float_rounding() -> None:
    assert 0 < equality.tolerance_of(0.0, torch.tensor([30.0, -math.inf])) < 1e-4


def test_race_scores_rank_like_replay() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(100, generator=generator).softmax(-1)
    noise = torch.empty(100).exponential_(generator=generator)
    assert int(equality.race_scores(probs, noise).argmax()) == int((probs / noise).argmax())


def test_comparison_counts_near_ties_apart() -> None:
    logits = torch.tensor([1.0, 5.0, 5.0, 3.0])
    c = equality.Comparison()
    c.add(None, 10)
    c.add(equality.explain(1, 4, 1, 2, logits, 1e-5), 4)
    c.add(equality.explain(2, 0, 1, 3, logits, 1e-5), 0)
    assert (c.compared, c.identical, c.near_ties, c.violations, c.tokens) == (3, 1, 1, 1, 14)
    assert c.to_json()["divergences"][0]["best"] in ([1, 2], [2, 1])


# --- on a toy model, with rules that are right and rules that are not


class AcceptAll:
    """Broken on purpose: whatever was drafted stands."""

    name = "accept-all"
    promise = Promise.LOSSLESS  # it lies
    paper = ""
    accepts = Rejection.accepts
    draw = Draw.SAMPLE

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        node, path = tree.tip, []
        while children := tree.children(node):
            node = children[0]
            path.append(node)
        bonus = rng.pick(p.probs([node])[0], position + len(path))
        return Verdict(path, [*(int(tree.tokens[n]) for n in path), bonus], len(path))


class NoResidual(AcceptAll):
    """Broken on purpose: after a refusal it draws from p instead of what is left of p."""

    name = "no-residual"

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict:
        verdict = Rejection()(tree, p, rng, position)
        node = verdict.path[-1] if verdict.path else tree.tip
        if tree.children(node):
            row = p.probs([node])[0]
            verdict.tokens[-1] = rng.pick(row, position + len(verdict.path))
        return verdict


PROMPT = [1, 2, 3, 1, 2]
SAMPLED = SamplingParams(temperature=1.0, top_k=6, max_tokens=3, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def toys() -> tuple[ToyModel, DraftModel]:
    torch.set_num_threads(1)
    target, small = ToyModel(seed=0, sharpness=2.0), ToyModel(seed=1, sharpness=1.0)
    return target, DraftModel(small, target.spec.vocab, tokens=2)


def speculative(toys: tuple[ToyModel, DraftModel], verify: object, **options: object) -> LLM:
    return LLM(toys[0], draft=toys[1], verify=verify, **options)  # type: ignore[arg-type]


def fit(toys: tuple[ToyModel, DraftModel], verify: object, runs: int) -> statistics.Fit:
    llm = speculative(toys, verify, max_batch=64)
    counts, drafted, accepted = sample(llm, PROMPT, SAMPLED, runs)
    assert 0 < accepted <= drafted
    law = joint_law(toys[0], PROMPT, SAMPLED)
    assert not law.alias
    return statistics.goodness_of_fit(counts, law.probs)


def test_joint_law_is_the_enumerated_one(toys: tuple[ToyModel, DraftModel]) -> None:
    law = joint_law(toys[0], PROMPT, replace(SAMPLED, top_k=0)).probs
    first = toys[0].next_probs(PROMPT)
    second = toys[0].next_probs([*PROMPT, 4])
    assert len(law) == 121
    assert sum(law.values()) == pytest.approx(1)
    assert law[4, 7] == pytest.approx(float(first[4] * second[7]), rel=1e-6)


@pytest.mark.stat
@pytest.mark.parametrize("rule", ["rejection", "replay"])
def test_right_rules_follow_the_target(toys: tuple[ToyModel, DraftModel], rule: str) -> None:
    result = fit(toys, rule, 20_000 if rule == "rejection" else 2_000)
    assert result.p_value > 0.001
    assert result.tv < 2 * result.tv_noise


@pytest.mark.stat
@pytest.mark.parametrize("rule", [AcceptAll(), NoResidual()], ids=lambda r: r.name)
def test_broken_rules_are_found(toys: tuple[ToyModel, DraftModel], rule: AcceptAll) -> None:
    result = fit(toys, rule, 2_000)
    assert not result.passed
    assert result.p_value < 1e-9


def test_a_broken_rule_fails_the_whole_check(toys: tuple[ToyModel, DraftModel]) -> None:
    settings = Settings(max_tokens=8, seeds=1, runs=400, top_k=6)
    prompts = [PROMPT, [4, 4, 7, 4, 4], [9]]
    report = run_check(speculative(toys, AcceptAll()), prompts, settings)
    assert report.distribution is not None
    assert not report.distribution.passed
    assert report.distribution.repeated  # confirmed by a larger sample
    assert report.greedy.identical == 3  # at temperature 0 the engine walks greedily
    assert not report.passed
    assert "replay" in report.skipped


def test_a_drafter_that_breaks_the_model_is_a_violation_not_a_tie(
    toys: tuple[ToyModel, DraftModel],
) -> None:
    """Greedy decoding with a rule that takes the drafter's word differs by more than rounding."""

    class Lossy(AcceptAll):
        promise = Promise.LOSSY

    llm = speculative(toys, Lossy(), allow_lossy=True)
    report = run_check(llm, [PROMPT, [3, 5]], Settings(max_tokens=12, seeds=1, runs=200, top_k=6))
    assert report.greedy.violations > 0
    assert not report.passed
    first = report.greedy.divergences[0]
    assert first.margin > first.tolerance
    assert "NOT explained" in first.sentence()


def test_check_passes_for_right_rules(toys: tuple[ToyModel, DraftModel]) -> None:
    settings = Settings(max_tokens=8, seeds=2, runs=400, top_k=6, batch=2)
    report = run_check(speculative(toys, "auto", max_batch=2), [PROMPT, [4, 4], [9]], settings)
    assert report.passed
    assert report.promise == "exact"
    assert report.replay is not None
    assert report.replay.identical == 6
    assert report.distribution is not None
    assert report.distribution.drafted > 0
    assert report.to_json()["distribution"]["passed"] is True


def test_greedy_only_rules_skip_the_sampled_parts(toys: tuple[ToyModel, DraftModel]) -> None:
    report = run_check(speculative(toys, "greedy"), [PROMPT], Settings(max_tokens=4))
    assert report.passed
    assert set(report.skipped) == {"replay", "distribution"}
