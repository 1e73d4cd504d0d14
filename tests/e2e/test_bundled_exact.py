"""The bundled pair on real prompts: every exact drafter says what plain decoding says.

The default run takes 3 prompts of each benchmark; `make test-all` takes 20 of each, 96 tokens, at
batch 1 and 8, greedy and sampled by replay.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import foretell
from foretell.models.load import bundled_model

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (bundled_model() / "model.safetensors").exists(), reason="no bundled model here"
    ),
]
DRAFTERS = ["prompt-lookup", "draft-model", "draft-model:branching=2"]
MODES = {"greedy": {}, "replay": {"temperature": 1.0, "seed": 7}}


def prompts(data: Path, each: int) -> list[str]:
    """The first `each` prompts of spec_bench (first turns), humaneval and gsm8k."""

    def rows(name: str) -> list[dict]:
        text = (data / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()[:each]]

    return [
        *(r["turns"][0] for r in rows("spec_bench/question.jsonl")),
        *(r["prompt"] for r in rows("humaneval/humaneval.jsonl")),
        *(r["question"] for r in rows("gsm8k/test.jsonl")),
    ]


def ids_of(texts: list[str], tokens: int, batch: int, draft: str, mode: dict) -> list[list[int]]:
    verify = "replay" if mode else "auto"
    llm = foretell.load(draft=draft, verify=verify, max_batch=batch, dtype="float32")
    return [o.token_ids for o in llm.generate(texts, max_tokens=tokens, **mode)]


@pytest.mark.parametrize("mode", MODES)
def test_a_few_prompts(data_dir: Path, mode: str) -> None:
    texts = prompts(data_dir, 3)
    plain = ids_of(texts, 32, 1, "none", MODES[mode])
    for draft in DRAFTERS:
        assert ids_of(texts, 32, 8, draft, MODES[mode]) == plain, draft


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("draft", DRAFTERS)
def test_sixty_prompts(data_dir: Path, mode: str, batch: int, draft: str) -> None:
    texts = prompts(data_dir, 20)
    plain = ids_of(texts, 96, 1, "none", MODES[mode])
    found = ids_of(texts, 96, batch, draft, MODES[mode])
    differ = [i for i, (a, b) in enumerate(zip(plain, found, strict=True)) if a != b]
    assert not differ, f"prompts {differ} of 60 differ"
