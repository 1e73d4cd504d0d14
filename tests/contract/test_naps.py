"""Budgets that come and go: a drafter that is not asked for some steps, and sequences that want few
drafts or none, change nothing about the text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

import helpers_reference as reference
import methods
from foretell import LLM, SamplingParams
from foretell.core.params import Speculation
from foretell.core.protocols import Budget, Load, SeqView
from helpers_model import pair

PROMPTS = [[1, 2, 3, 4, 1, 2], [7, 8, 9], [5], [1, 2, 3, 4, 9, 9, 1, 2]]


class Naps:
    """Drafts nothing for anybody on some steps, and nothing for some on others."""

    name, paper = "naps", ""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]:
        if self.random.random() < 0.4:
            return [Budget(0, 0)] * len(views)
        return [
            Budget(6, 3) if self.random.random() < 0.6 else Budget(self.random.randint(0, 1), 0)
            for _ in views
        ]

    def observe(self, *_: Any) -> None: ...


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", methods.SPECULATIVE)
def test_sleeping_drafters_and_small_wishes(draft: str, temperature: float) -> None:
    target, context = pair()
    llm = LLM(target, draft=draft, policy=Naps(3), context=context, max_batch=3, step_rows=6)  # type: ignore[arg-type]
    for i, wish in enumerate((Speculation(), Speculation(max_draft=1), Speculation("off"))):
        params = SamplingParams(max_tokens=14, temperature=temperature, seed=i)
        for prompt, out in zip(
            PROMPTS, llm.generate(PROMPTS, params, speculation=wish), strict=True
        ):
            assert out.token_ids == reference.decode(target, prompt, params)
            assert len(out.stats.per_position) <= min(wish.limit, 14)
            if wish.off:
                assert out.stats.drafted == 0
                assert out.drafter == "off"
