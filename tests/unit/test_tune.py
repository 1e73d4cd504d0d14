"""The race between settings, on simulated machines whose truth is known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from foretell.cli.main import main
from foretell.lab.tune.race import Race, Run
from foretell.lab.tune.space import PLAIN, space

PROMPTS = list(range(20))


def race(truth: dict[str, float], noise: float = 0.05, seed: int = 0, **more) -> Race:
    """truth: speed-up of each setting; prompts differ in difficulty by a factor of up to two."""
    dice = random.Random(seed)

    def run(name: str, prompt: int) -> Run:
        seconds = (1 + prompt % 3 / 2) / truth[name] * dice.lognormvariate(0, noise)
        return Run(seconds, 100, [prompt])

    return Race(run, PLAIN, list(truth), **more)


@pytest.mark.parametrize("seed", range(8))
def test_the_fastest_wins_and_the_slow_leave_early(seed: int) -> None:
    r = race({PLAIN: 1.0, "slow": 0.6, "good": 1.5, "best": 2.1, "awful": 0.2}, seed=seed)
    assert r.go(PROMPTS).name == "best"
    tried = {e.name: len(e.gains) for e in r.entrants}
    assert tried["awful"] == tried["slow"] == 2
    assert all(e.out for e in r.entrants if e.name != "best")
    assert len(r.base.gains) < len(PROMPTS)


@pytest.mark.parametrize("seed", range(8))
def test_the_answer_may_be_not_to_speculate(seed: int) -> None:
    assert race({PLAIN: 1.0, "a": 0.93, "b": 0.8}, seed=seed).go(PROMPTS).name == PLAIN


def test_a_tie_is_settled_by_the_end_of_the_prompts() -> None:
    r = race({PLAIN: 1.0, "a": 1.5, "b": 1.5})
    assert r.go(PROMPTS).name in ("a", "b")
    assert len(r.base.gains) == len(PROMPTS)


def test_an_entrant_that_says_something_else_leaves_at_once() -> None:
    r = race({PLAIN: 1.0, "a": 1.5, "liar": 9.0})
    honest = r.run
    r.run = lambda name, p: Run(1e-6, 100, [-1]) if name == "liar" else honest(name, p)
    assert r.go(PROMPTS).name == "a"
    liar = next(e for e in r.entrants if e.name == "liar")
    assert len(liar.gains) == 1
    assert "differs" in liar.out


def test_time_ends_the_race_after_the_first_prompt() -> None:
    r = race({PLAIN: 1.0, "a": 1.5, "b": 1.4}, stop=lambda: len(r.base.gains) >= 1)
    r.go(PROMPTS)
    assert len(r.base.gains) == 1
    assert all(len(e.gains) == 1 for e in r.entrants)


def test_one_lucky_prompt_is_no_proof() -> None:
    r = race({PLAIN: 1.0, "a": 1.05}, noise=0.0)
    assert r.go(PROMPTS[:1]).name == PLAIN  # 5 % in one observation may be noise


def test_the_space_is_what_is_at_hand() -> None:
    full = space(draft=True, path="some/where")
    assert full[0].name == PLAIN
    drafts = [m.draft for m in full if m.draft.startswith("draft-model")]
    assert drafts
    assert all("path=some/where" in d for d in drafts)
    assert not [m for m in space(draft=False) if m.draft.startswith("draft-model")]
    assert not [m for m in space(draft=True, branching=False) if "tree=" in m.draft]


@pytest.mark.e2e
def test_the_written_config_is_what_generate_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned.json"
    words = ["--methods", "prompt-lookup", "--budget", "20", "--max-tokens", "24", "--limit", "3"]
    assert main(["tune", *words, "--threads", "1", "--out", str(out), "--json"]) == 0
    config = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert config == json.loads(out.read_text())
    report = config["tuned"]
    assert report["speculate"] == (config["draft"] != "none")
    assert report["tried"][0]["prompts"] >= 1
    assert main(["generate", "def f(x):", "--config", str(out), "--max-tokens", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["speculation"]["drafter"] == config["draft"].partition(":")[0]
