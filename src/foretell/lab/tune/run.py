"""Tuning: which threads, which drafter, how much of it, on this machine and this workload."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from foretell.core.errors import InputError
from foretell.core.params import SamplingParams
from foretell.engine.curve import ForwardTimer, medians
from foretell.engine.llm import LLM
from foretell.lab.bench.methods import PLAIN, Method
from foretell.lab.tune.race import Race, Run

WARM = 8  # tokens of the warm-up


@dataclass(slots=True)
class Tuned:
    """What was found: the options to use, and everything that was measured on the way."""

    method: Method
    dtype: str
    threads: int
    speedup: float
    report: dict[str, Any]

    def config(self) -> dict[str, Any]:
        """What every command takes with --config; `tuned` is for people."""
        options: dict[str, Any] = {
            "draft": self.method.draft,
            "verify": self.method.verify,
            "policy": self.method.policy,
            "dtype": self.dtype,
            "threads": self.threads,
        }
        return {**options, "tuned": self.report}


@dataclass(slots=True)
class Tuner:
    """Runs the measurements for one loaded model.

    prompts: lists of ids; budget_s: seconds for everything; say(text): progress.
    """

    llm: LLM
    prompts: Sequence[list[int]]
    params: SamplingParams
    methods: Sequence[Method]
    dtype: str
    budget_s: float = 600.0
    batch: int = 1
    say: Callable[[str], None] = lambda text: None
    _engines: dict[str, LLM] = field(default_factory=dict)
    _broken: dict[str, str] = field(default_factory=dict)

    def threads(self, choices: Sequence[int]) -> tuple[int, list[dict[str, float]]]:
        """The thread count whose forwards of 1 and of 8 rows take the least time together."""
        table = []
        for n in choices:
            self.say(f"{n} thread{'s' * (n > 1)}")
            set_threads(self.llm, n)
            found = medians(ForwardTimer(self.llm.model, 64), [1, 8], 0.3)
            table.append({"threads": n, "ms_1": found[1] * 1e3, "ms_8": found[8] * 1e3})
        best = min(table, key=lambda row: row["ms_1"] * row["ms_8"])
        set_threads(self.llm, int(best["threads"]))
        return int(best["threads"]), [{k: round(v, 4) for k, v in row.items()} for row in table]

    def go(self, threads: Sequence[int]) -> Tuned:
        started = time.monotonic()
        chosen, thread_table = self.threads(threads)
        usable = [m.name for m in self.methods if self._usable(m)]
        race = Race(
            self._run,
            PLAIN,
            usable,
            exact=True,
            stop=lambda: time.monotonic() - started > self.budget_s,
            progress=self.say,
        )
        for name in usable:
            self._run(name, self.prompts[0], warm=True)
        winner = race.go(self.prompts)
        ranked = sorted(race.entrants, key=lambda e: (bool(e.out), -e.mean))
        tried = [e.to_json() for e in ranked]
        tried += [{"setting": s, "rejected": why} for s, why in self._broken.items()]
        speculate = winner.name != PLAIN
        report = {
            "speculate": speculate,
            "why": _why(winner.name, math.exp(winner.mean), math.exp(winner.low), race),
            "speedup": round(math.exp(winner.mean), 4),
            "plain": race.base.to_json(),
            "tried": tried,
            "threads": thread_table,
            "prompts": len(race.base.gains),
            "max_tokens": self.params.max_tokens,
            "batch": self.batch,
            "seconds": round(time.monotonic() - started, 1),
        }
        method = next(m for m in self.methods if m.name == winner.name)
        return Tuned(method, self.dtype, chosen, math.exp(winner.mean), report)

    def _usable(self, method: Method) -> bool:
        try:
            self._engines[method.name] = self.llm.with_methods(
                method.draft, method.verify, method.policy, max_batch=self.batch
            )
        except InputError as error:
            self._broken[method.name] = str(error)
            return False
        return True

    def _run(self, name: str, prompt: list[int], warm: bool = False) -> Run:
        engine = self._engines[name]
        more: dict[str, Any] = {"max_tokens": WARM} if warm else {}
        outputs = engine.generate([prompt] * self.batch, self.params, **more)
        stats = outputs[0].stats
        return Run(
            max(stats.decode_s, 1e-9),
            max(1, stats.emitted - stats.first_step),
            list(outputs[0].token_ids),
            stats.acceptance_length,
        )


def _why(name: str, speedup: float, low: float, race: Race) -> str:
    if name != PLAIN:
        return f"x{speedup:.2f} over plain decoding, at least x{low:.2f} with 95 % confidence"
    best = race.leader
    if best is None:
        return "do not speculate: every other setting was surely slower or unusable"
    return (
        f"do not speculate: the best setting, {best.name}, measured x{math.exp(best.mean):.2f} and "
        f"may be as slow as x{math.exp(best.low):.2f}"
    )


def set_threads(llm: LLM, threads: int) -> None:
    """Change the CPU threads of a loaded model."""
    torch.set_num_threads(threads)
    setter = getattr(llm.model, "set_threads", None)
    if setter is not None:
        setter(threads)


def thread_choices(most: int | None = None) -> list[int]:
    """1, 2, 4, ... up to the processors this process may use."""
    limit = most or len(os.sched_getaffinity(0))
    powers = [1 << i for i in range(limit.bit_length()) if 1 << i <= limit]
    return sorted({*powers, limit})
