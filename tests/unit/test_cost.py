"""What a forward costs: the curve, its correction by use, and its copy on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from foretell import LLM, kernels
from foretell.core.costs import row_range
from foretell.engine.cost import MeasuredCost, identity
from foretell.engine.curve import Curve, ForwardTimer, _rising, medians
from foretell.models.native.arch import Arch
from foretell.models.native.runner import NativeModel

CURVE = Curve([1, 2, 4, 8], [1e-3, 1.1e-3, 1.3e-3, 2.1e-3], 1e-6, 1e-7, 5e-5)


@pytest.fixture
def model() -> NativeModel:
    return NativeModel.random(Arch.llama(50, 16, 2, 2, 1, 24, max_positions=96))


def test_the_curve_meets_its_points_and_goes_on_straight() -> None:
    assert [CURVE.at(n) for n in (1, 2, 4, 8)] == pytest.approx(CURVE.seconds)
    assert CURVE.at(3) == pytest.approx(1.2e-3)
    assert CURVE.at(12) == pytest.approx(2.1e-3 + 4 * 0.2e-3)


def test_more_rows_never_cost_less() -> None:
    assert _rising([3.0, 1.0, 2.0, 5.0]) == [2.0, 2.0, 2.0, 5.0]
    assert _rising([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]


def test_context_and_company_add_to_the_curve(model: NativeModel) -> None:
    cost = MeasuredCost(model)
    cost._curve, cost._table = CURVE, [CURVE.at(max(1, n)) for n in range(9)]
    assert cost.seconds(4) == pytest.approx(1.3e-3)
    # 4 rows of 2 sequences that hold 300 rows: reads 300, and every row meets 150 of them
    expected = 1.3e-3 + 300e-6 + 4 * 150 * 1e-7 + 5e-5
    assert cost.seconds(4, 300, 2) == pytest.approx(expected)
    assert cost.seconds(500) > cost.seconds(8)


def test_a_step_between_two_numbers_of_rows_is_learned(model: NativeModel) -> None:
    """The fifth row needs another pass over the weights."""
    cost = MeasuredCost(model)
    cost._curve, cost._table = CURVE, [CURVE.at(max(1, n)) for n in range(9)]
    for rows in [3, 4, 5, 6] * 150:
        cost.observe(rows, 0, 1, 1.3e-3 if rows < 5 else 2e-3)
    truth = [1.3e-3, 1.3e-3, 2e-3, 2e-3]
    assert [cost.seconds(n) for n in (3, 4, 5, 6)] == pytest.approx(truth, rel=0.02)


def test_use_corrects_the_prediction(model: NativeModel) -> None:
    """The machine is half as fast as measured, and 8 rows cost another 30 % more."""
    cost = MeasuredCost(model)
    cost._curve, cost._table = CURVE, [CURVE.at(max(1, n)) for n in range(9)]
    noise = random.Random(0)
    for _ in range(300):
        rows = noise.choice([1, 4, 8])
        truth = CURVE.at(rows) * 2 * (1.3 if rows == 8 else 1)
        cost.observe(rows, 0, 1, truth * noise.uniform(0.95, 1.05))
    assert cost.seconds(1) == pytest.approx(2e-3, rel=0.05)
    assert cost.seconds(8) == pytest.approx(2.1e-3 * 2.6, rel=0.05)
    cost.errors.clear()
    cost.observe(4, 0, 1, 2.6e-3)
    assert cost.error is not None
    assert cost.error < 0.05


def test_one_interruption_moves_little(model: NativeModel) -> None:
    cost = MeasuredCost(model)
    cost._curve, cost._table = CURVE, [CURVE.at(max(1, n)) for n in range(9)]
    cost.observe(1, 0, 1, 3.0)
    assert cost.seconds(1) < 1.1e-3


def test_nothing_is_measured_before_somebody_asks(model: NativeModel, tmp_path: Path) -> None:
    cost = MeasuredCost(model, tmp_path)
    cost.observe(1, 0, 1, 1e-3)
    assert cost.error is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["", "[]", '{"version": 1}', '{"version": 99, "rows": [1, 2]}'])
def test_a_measurement_is_kept_and_a_broken_file_measured_again(
    model: NativeModel, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(Curve, "measure", lambda m: taken.append(m) or CURVE)
    (tmp_path / f"{identity(model)}.json").write_text(broken)
    assert MeasuredCost(model, tmp_path).seconds(1) == 1e-3
    assert MeasuredCost(model, tmp_path).seconds(2) == pytest.approx(1.1e-3)
    assert len(taken) == 1
    [file] = tmp_path.iterdir()
    assert json.loads(file.read_bytes())["seconds"] == CURVE.seconds


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory(
    model: NativeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Curve, "measure", lambda m: CURVE)
    (tmp_path / "file").write_text("")
    assert MeasuredCost(model, tmp_path / "file" / "below").seconds(1) == 1e-3


def test_another_dtype_or_thread_count_is_another_machine(model: NativeModel) -> None:
    import torch

    other = NativeModel.random(model.arch, torch.bfloat16)
    assert identity(other) != identity(model)
    name = identity(model)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert identity(model) != name
    finally:
        torch.set_num_threads(before)


def test_other_kernels_are_another_machine() -> None:
    """A curve measured before the kernels changed must not choose for those of today."""
    llm = LLM.load()
    model, name = llm.model, identity(llm.model)
    library = kernels.load()
    if library is None:
        pytest.skip("no kernels on this machine")
    assert model.build == library.build
    model.build = "elsewhere/avx2.so"
    assert identity(model) != name


def test_the_timer_leaves_the_caches_as_they_were(model: NativeModel) -> None:
    timer = ForwardTimer(model, context=20, sequences=2)
    found = medians(timer, [1, 4], 0.0)
    assert set(found) == {1, 4}
    assert all(v > 0 for v in found.values())
    for cache in timer.caches:
        cache.check()
        assert cache.n == 20


def test_a_curve_is_measured_within_the_context_of_a_small_model(model: NativeModel) -> None:
    curve = Curve.measure(model)
    assert curve.rows[-1] <= model.spec.max_positions
    assert curve.seconds == sorted(curve.seconds)
    assert curve.per_context >= 0
    assert curve.per_pair >= 0


def test_small_numbers_of_rows_are_ranges_of_their_own() -> None:
    assert len({row_range(n, 4) for n in range(18)}) == 18
    assert row_range(17, 4) == row_range(19, 4) < row_range(20, 4)
    assert row_range(33, 2) - row_range(17, 2) == 2
