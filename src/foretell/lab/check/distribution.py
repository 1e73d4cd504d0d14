"""Does speculative sampling follow the target's law? The joint of the first two tokens, tested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foretell.control.processors import Processors
from foretell.core.params import SamplingParams
from foretell.core.protocols import TargetModel
from foretell.engine.llm import LLM
from foretell.lab.check.equality import tolerance_of
from foretell.lab.check.reference import last_logits, logits_and_noise
from foretell.lab.check.statistics import Fit, goodness_of_fit

Pair = tuple[int, int]
Advance = Callable[[int], None]
TOKENS = 3  # one more than is tested: a draft of two can then be accepted as a whole
REQUEST = 500  # samples of one request
BATCH = 64


@dataclass(frozen=True, slots=True)
class JointLaw:
    """The exact law of the first two tokens after a prompt."""

    probs: dict[Pair, float]
    alias: dict[tuple[int | None, int], int]
    """(first token or None, token) -> token: ids just below the top-k boundary, within rounding of
    the k-th, which a forward of another shape may swap with it."""

    def cell(self, pair: Pair) -> Pair:
        first = self.alias.get((None, pair[0]), pair[0])
        return first, self.alias.get((first, pair[1]), pair[1])


def joint_law(model: TargetModel, prompt: Sequence[int], params: SamplingParams) -> JointLaw:
    """Enumerate the law with forwards of one row at a time."""
    cut = max(1, len(prompt) - 4)
    logits, noise = logits_and_noise(model, prompt[:cut], prompt[cut:])
    tolerance = tolerance_of(noise, logits)
    alias: dict[tuple[int | None, int], int] = {}
    first = _law(logits, prompt, [], params)
    _aliases(alias, None, logits, first, tolerance)
    probs: dict[Pair, float] = {}
    for x in first.nonzero().flatten().tolist():
        logits = last_logits(model, prompt, [x], 1)
        second = _law(logits, prompt, [x], params)
        _aliases(alias, x, logits, second, tolerance)
        for y in second.nonzero().flatten().tolist():
            probs[x, y] = float(first[x] * second[y])
    total = sum(probs.values())
    return JointLaw({k: v / total for k, v in probs.items()}, alias)


def _law(
    logits: Tensor, prompt: Sequence[int], output: list[int], params: SamplingParams
) -> Tensor:
    """[V] float64: the processed distribution after prompt + output."""
    processors = Processors(params, [*prompt, *output], len(prompt))
    return processors.probs(logits[None], [[]], None)[0].double()


def _aliases(
    alias: dict[tuple[int | None, int], int],
    first: int | None,
    logits: Tensor,
    law: Tensor,
    tolerance: float,
) -> None:
    kept = law > 0
    last = int(torch.where(kept, logits, torch.inf).argmin())
    for token in (~kept & (logits >= logits[last] - tolerance)).nonzero().flatten().tolist():
        alias[first, token] = last


@dataclass(frozen=True, slots=True)
class DistributionResult:
    """The outcome of the sampled-distribution test."""

    fit: Fit
    prompt: int  # index of the prompt
    top_k: int
    drafted: int  # over all runs; 0 = the test says nothing about speculation
    accepted: int
    repeated: bool  # a first, smaller sample had looked wrong

    @property
    def passed(self) -> bool:
        return self.fit.passed

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.fit),
            "passed": self.passed,
            "prompt": self.prompt,
            "top_k": self.top_k,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "repeated": self.repeated,
        }


def fit_distribution(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    runs: int,
    *,
    alpha: float = 1e-4,
    power: float = 0.99,
    seed: int = 1,
    advance: Advance = lambda runs: None,
) -> DistributionResult:
    """Sample `runs` continuations by the drafter and verifier of `llm` and compare them with the
    exact joint law. A sample that looks wrong is repeated once, four times as large, before it
    counts: chance alone then fails with probability alpha squared."""
    params = replace(params, max_tokens=TOKENS, ignore_eos=True, n=1, seed=seed)
    rule = llm.rules.verifier_for(params)
    sampler = llm.with_methods(llm.drafter, rule, llm.policy, max_batch=BATCH, allow_lossy=True)
    index, prompt = choose_prompt(sampler, prompts, params)
    law = joint_law(llm.model, prompt, params)

    def attempt(stream: int, many: int) -> DistributionResult:
        counts, drafted, accepted = sample(sampler, prompt, params, many, stream, advance)
        cells = Counter[Pair]()
        for pair, count in counts.items():
            cells[law.cell(pair)] += count
        fit = goodness_of_fit(cells, law.probs, alpha, power)
        return DistributionResult(fit, index, params.top_k, drafted, accepted, stream > 0)

    result = attempt(0, runs)
    return result if result.passed else attempt(1, 4 * runs)


def sample(
    llm: LLM,
    prompt: Sequence[int],
    params: SamplingParams,
    runs: int,
    stream: int = 0,
    advance: Advance = lambda runs: None,
) -> tuple[Counter[Pair], int, int]:
    """Counts of the first two tokens over `runs` samples, and how much was drafted and accepted."""
    counts: Counter[Pair] = Counter()
    drafted = accepted = 0
    for start in range(0, runs, REQUEST):
        many = min(REQUEST, runs - start)
        seed = (params.seed or 0) + 1_000_003 * (stream * 1_000 + start // REQUEST)
        [output] = llm.generate([list(prompt)], replace(params, n=many, seed=seed))
        for s in output.samples:
            counts[s.token_ids[0], s.token_ids[1]] += 1
            drafted += s.stats.drafted
            accepted += s.stats.accepted
        advance(many)
    return counts, drafted, accepted


def choose_prompt(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> tuple[int, list[int]]:
    """A prompt after which the drafter drafts and the law is spread out: where both hold, a wrong
    rule shows. Candidates: the beginnings of the first few prompts, and, for drafters that copy,
    a beginning repeated."""
    candidates = [(i, list(p[:32])) for i, p in enumerate(prompts[:6])]
    candidates += [(i, (list(p[:6]) * 4)[:-2]) for i, p in enumerate(prompts[:3])]
    best, chosen = (-1.0, -1.0), candidates[0]
    for index, ids in candidates:
        _, drafted, _ = sample(llm, ids, params, 16)
        law = _law(last_logits(llm.model, ids, [], 1), ids, [], params)
        entropy = float(torch.special.entr(law).sum())
        score = (float(drafted > 0), entropy)
        if score > best:
            best, chosen = score, (index, ids)
    return chosen
