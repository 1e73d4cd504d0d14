"""The three tests of `foretell check`, on a model the user brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from foretell.control.processors import Processors
from foretell.core.errors import InputError
from foretell.core.params import SamplingParams
from foretell.core.protocols import Promise
from foretell.core.rng import Purpose, SeqRng
from foretell.engine.llm import LLM
from foretell.lab.check.distribution import DistributionResult, fit_distribution
from foretell.lab.check.equality import (
    Comparison,
    Divergence,
    explain,
    first_difference,
    race_scores,
    tolerance_of,
)
from foretell.lab.check.reference import logits_and_noise

Stage = Callable[[str, int], Callable[[int], None]]
"""stage(name, total) -> advance(steps): how progress is shown."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to test, and how much of it."""

    max_tokens: int = 64
    seeds: int = 2
    temperature: float = 1.0
    runs: int = 2000  # of the sampled-distribution test
    top_k: int = 8
    alpha: float = 1e-4
    power: float = 0.99
    batch: int = 1


@dataclass(slots=True)
class Report:
    """What the tests found. A part that does not apply is None and `skipped` says why."""

    promise: str
    drafter: str
    verifier: str
    greedy: Comparison
    replay: Comparison | None
    distribution: DistributionResult | None
    skipped: dict[str, str]

    @property
    def passed(self) -> bool:
        equal = all(c is None or not c.violations for c in (self.greedy, self.replay))
        return equal and (self.distribution is None or self.distribution.passed)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "promise": self.promise,
            "drafter": self.drafter,
            "verifier": self.verifier,
            "greedy": self.greedy.to_json(),
            "replay": self.replay and self.replay.to_json(),
            "distribution": self.distribution and self.distribution.to_json(),
            "skipped": self.skipped,
        }


def run_check(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    stage: Stage = lambda name, total: lambda steps: None,
) -> Report:
    """Compare `llm` with plain decoding by the same model.

    prompts: token ids. Raises InputError where a prompt does not fit the model.
    """
    plain = llm.with_methods(max_batch=settings.batch)
    greedy = SamplingParams(max_tokens=settings.max_tokens)
    sampled = SamplingParams(max_tokens=settings.max_tokens, temperature=settings.temperature)
    advance = stage("greedy", 2 * len(prompts))
    equal = Comparison()
    compare(equal, plain, llm, prompts, greedy, settings.batch, advance)

    skipped: dict[str, str] = {}
    replay = distribution = None
    try:
        promise = llm.rules.promise(sampled)
        verifier = llm.rules.verifier_for(sampled).name
    except InputError:
        promise, verifier = llm.rules.promise(greedy), llm.rules.verifier_for(greedy).name
        reason = f"'{verifier}' only verifies greedy decoding"
        skipped = {"replay": reason, "distribution": reason}
    if not skipped and promise is not Promise.EXACT:
        skipped["replay"] = f"'{verifier}' is {promise}: sampled text may differ, its law may not"
    if "replay" not in skipped:
        replay = Comparison()
        advance = stage("replay", 2 * len(prompts) * settings.seeds)
        for seed in range(1, settings.seeds + 1):
            params = SamplingParams(
                max_tokens=settings.max_tokens, temperature=settings.temperature, seed=seed
            )
            compare(replay, plain, llm, prompts, params, settings.batch, advance)
    if "distribution" not in skipped:
        params = SamplingParams(temperature=settings.temperature, top_k=settings.top_k)
        distribution = fit_distribution(
            llm,
            prompts,
            params,
            settings.runs,
            alpha=settings.alpha,
            power=settings.power,
            advance=stage("distribution", settings.runs),
        )
    return Report(str(promise), llm.drafter.name, verifier, equal, replay, distribution, skipped)


def compare(
    into: Comparison,
    plain: LLM,
    speculative: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    batch: int = 1,
    advance: Callable[[int], None] = lambda steps: None,
) -> None:
    """Decode every prompt both ways and explain the first difference of each."""
    results = []
    for llm in (plain, speculative):
        llm.engine.scheduler.clear_kept()  # rows of an earlier pass would hide a bad prefill
        results.append(
            llm.generate(
                [list(p) for p in prompts],
                params,
                on_event=lambda e: advance(1) if e.finish_reason else None,
            )
        )
    for index, (a, b) in enumerate(zip(*results, strict=True)):
        at = first_difference(a.token_ids, b.token_ids)
        if at is None:
            into.add(None, len(a.token_ids))
        else:
            found = _divergence(
                plain, index, prompts[index], a.token_ids, b.token_ids, at, params, batch
            )
            into.add(found, at)


def _divergence(
    llm: LLM,
    index: int,
    prompt: Sequence[int],
    plain: Sequence[int],
    speculative: Sequence[int],
    at: int,
    params: SamplingParams,
    batch: int,
) -> Divergence:
    """Recompute the logits on the common prefix and judge the difference by them."""
    logits, noise = logits_and_noise(llm.model, prompt, plain[:at], batch)
    tolerance = tolerance_of(noise, logits)
    scores = logits
    if not params.greedy:
        probs = Processors(params, [*prompt, *plain[:at]], len(prompt)).probs(
            logits[None], [[]], None
        )[0]
        rng = SeqRng(SeqRng(params.seed or 0).fork(0))
        position = len(prompt) + at
        race = rng.race([position], Purpose.TARGET, len(logits), logits.device)[0]
        scores, tolerance = race_scores(probs, race), tolerance / params.temperature
    one = plain[at] if at < len(plain) else None
    other = speculative[at] if at < len(speculative) else None
    return explain(index, at, one, other, scores, tolerance)
