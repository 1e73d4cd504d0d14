"""The memory plan: numbers of a loaded engine, and a sentence when they do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foretell import LLM, InputError
from foretell.core.protocols import BuildContext
from foretell.models.toy import ToyModel
from foretell.serve.plan import MemoryPlan, make_plan


def llm(**options) -> LLM:
    target, draft = ToyModel(11, seed=0), ToyModel(11, seed=1)
    context = BuildContext(target, None, lambda path: draft, "toy")
    return LLM(target, context=context, **options)


def test_what_a_loaded_engine_may_take() -> None:
    engine = llm(draft="choice:of=draft-model+prompt-lookup", kv_rows=1000)
    plan = make_plan(engine)
    spec = engine.model.spec
    assert (plan.kv_rows, plan.row, plan.weights) == (1000, spec.row_bytes, spec.weight_bytes)
    assert plan.draft_row == engine.context.load_model("toy").spec.row_bytes  # type: ignore[misc]
    assert plan.kv == 1000 * spec.row_bytes
    assert plan.needed == plan.kv + plan.draft_kv + plan.workspace
    assert plan.free > 0
    assert make_plan(llm(draft="none")).draft_row == 0
    assert make_plan(llm(draft="early-exit:layer=1")).draft_row == 0, "it runs the target itself"


def test_what_does_not_fit_is_refused_with_a_number_that_does() -> None:
    plan = MemoryPlan(10, 5, 1000, 1 << 20, 1 << 18, 1 << 22, 1 << 29)
    with pytest.raises(InputError, match=r"lower --kv-rows to \d+ or less") as e:
        plan.check()
    assert "\n" not in str(e.value)
    replace(plan, kv_rows=plan.most_rows).check()
    with pytest.raises(InputError):
        replace(plan, kv_rows=plan.most_rows + 1).check()
    lines = plan.lines()
    assert any("1,000 rows" in line for line in lines)
    assert all(len(line) < 100 for line in lines)
