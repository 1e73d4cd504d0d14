"""Measure every registered method on the same prompts in one run.

For each repeat and each prompt all methods take their turn; the one that begins moves on with every
prompt, and each decodes a few tokens before its timed call, as in `foretell bench`. Speeds are
compared prompt by prompt with plain decoding of the same run, medians over the repeats. Rules are
measured at temperature 1 in a second pass, for what they accept and not for time: repeat n has
seed n. A method that does not start, or fails, is left out with a sentence that says why.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foretell.core.errors import ForetellError, InputError
from foretell.core.registry import lookup
from foretell.lab.bench import machine, provenance
from foretell.lab.bench.methods import PLAIN
from foretell.lab.bench.prompts import Unit, encode_items, units
from foretell.lab.bench.summary import count_tokens, summarise
from foretell.lab.bench.systems import OWN, SETTLE_PROMPT, SETTLE_TOKENS, Hooks
from foretell.lab.bench.workers.own import System
from foretell.lab.bench.workloads import Workload
from foretell.lab.methods.catalogue import Entry, needs_of
from foretell.lab.methods.weigh import Weighed

SHOWN = ("acceptance_length", "acceptance_rate", "decode_speedup", "equal", "prompts", "tokens")
WARM_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything but the methods that decides what the figures mean."""

    model: str | None = None
    draft_path: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    max_tokens: int = 64
    repeats: int = 3


def measure(
    entries: Sequence[Entry], workload: Workload, settings: Settings, hooks: Hooks
) -> dict[str, Any]:
    """`provenance`, `families`, and of every entry its facts, needs, bytes and figures."""
    before, hardware = machine.Ticks.now(), machine.hardware()
    started = time.strftime("%Y-%m-%d %H:%M %z")
    hooks.note("loading the model")
    greedy, facts = _load(entries, settings)
    sampled = _beside(greedy, 1.0)
    prompts, cut = _prompts(greedy, workload, settings, facts, hooks)
    groups = units(prompts, 1)
    timed = [e for e in entries if e.method and e.kind != "verifier"]
    rules = [e for e in entries if e.method and e.kind == "verifier"]
    figures = _Pass(greedy, timed, groups, settings, facts, hooks).measure("decoding")
    figures |= _Pass(sampled, rules, groups, settings, facts, hooks).measure("rules")
    _weigh(greedy, timed, groups, settings, hooks)
    after = machine.Ticks.now()
    draft = settings.draft_path or facts["default_draft"]
    return {
        "provenance": {
            "started": started,
            "commit": provenance.commit(),
            "versions": provenance.versions(),
            "environment": provenance.environment(),
            "machine": {**hardware, "device": facts["device"]},
            "others": after.since(before) if before and after else None,
            "settings": asdict(settings) | {"dtype": facts["dtype"], "threads": facts["threads"]},
            "model": {"name": facts["name"], **provenance.describe_model(Path(facts["folder"]))},
            "draft": provenance.describe_model(Path(draft)) if draft else None,
            "workload": workload.to_json(),
            "prompts": len(prompts),
            "cut": cut,
            "chat_template": facts["chat"],
        },
        "families": list(dict.fromkeys(p.family for p in prompts)),
        "methods": [_result(e, figures.get(e.key)) for e in entries],
    }


def _load(entries: Sequence[Entry], settings: Settings) -> tuple[System, dict[str, Any]]:
    system = System()
    config = asdict(settings) | {
        "batch": 1,
        "temperature": 0.0,
        "seed": 0,
        "ignore_eos": False,
        "allow_lossy": True,
        "methods": {e.key: e.method.to_json() for e in entries if e.method is not None},
    }
    return system, system.load(config)


def _beside(system: System, temperature: float) -> System:
    """Another system over the same weights."""
    other = System()
    other.config = {**system.config, "temperature": temperature}
    other.llm, other.ready, other.cuda = system.llm, {}, system.cuda
    return other


def _prompts(
    system: System, workload: Workload, s: Settings, facts: Mapping[str, Any], hooks: Hooks
) -> tuple[list[Any], int]:
    room = facts["max_positions"] - s.max_tokens
    if room < 1:
        raise InputError(
            f"--max-tokens {s.max_tokens} leaves no room for prompts in the model's context of "
            f"{facts['max_positions']}."
        )

    def plain(ids: list[int]) -> list[int]:
        return system.run(PLAIN, [ids], s.max_tokens)["ids"][0]

    found, _ = encode_items(
        [(i, i.family) for i in workload.items],
        lambda do, **a: getattr(system, do)(**a),
        plain,
        chat=facts["chat"],
        room=room,
        cut=True,
        advance=hooks.stage("prompts", len(workload.items)),
    )
    return found, sum(1 for p in found if p.cut)


@dataclass(slots=True)
class _Pass:
    """Some methods in turns over all prompts."""

    system: System
    entries: Sequence[Entry]
    units: Sequence[Unit]
    settings: Settings
    facts: Mapping[str, Any]
    hooks: Hooks

    def measure(self, title: str) -> dict[str, dict[str, Any]]:
        """key -> family -> figures."""
        for entry in self.entries:
            self._start(entry)
        repeats, records = self.settings.repeats, []
        advance = self.hooks.stage(title, len(self.units) * len(self.entries) * repeats)
        for repeat in range(repeats):
            if self.system.config["temperature"] > 0:
                self.system.config["seed"] = repeat
            self.system.fresh()
            for n, unit in enumerate(self.units):
                first = (n + repeat) % max(1, len(self.entries))
                for entry in [*self.entries[first:], *self.entries[:first]]:
                    if not entry.reason:
                        records += self._record(entry, unit, repeat)
                    advance(1)
        alive = {e.key: {"system": OWN} for e in self.entries if not e.reason}
        greedy = self.system.config["temperature"] == 0
        summary = summarise(records, alive, self.facts["eos"], compare_ids=greedy)
        return {
            name: {
                family: {k: v for k, v in figures.items() if k in SHOWN}
                for family, figures in found.get("by_family", {}).items()
            }
            for name, found in summary["methods"].items()
        }

    def _start(self, entry: Entry) -> None:
        """Create and warm up; what fails says why."""
        try:
            part: Any = lookup(entry.kind, entry.facts["name"])
            entry.needs = needs_of(entry.kind, part)
            reason = self.system.modes([entry.key])[entry.key]
            if reason is None:
                llm = self.system.ready[entry.key]
                entry.needs = needs_of(entry.kind, _part(llm, entry.kind) or part)
                for _ in range(2):
                    tokens = min(WARM_TOKENS, self.settings.max_tokens)
                    self.system.run(entry.key, self.units[0].prompts, tokens)
            entry.reason = reason or ""
        except Exception as error:  # a method that fails is a row of the table, not the end of it
            entry.reason = _sentence(error)
        if entry.reason and entry.key == PLAIN:
            raise InputError(
                f"Plain decoding fails, so there is nothing to compare: {entry.reason}"
            )

    def _record(self, entry: Entry, unit: Unit, repeat: int) -> list[dict[str, Any]]:
        most, prompts = self.settings.max_tokens, unit.prompts
        try:
            self.system.run(entry.key, [p[:SETTLE_PROMPT] for p in prompts], SETTLE_TOKENS)
            found = self.system.run(entry.key, prompts, most)
        except Exception as error:
            entry.reason = f"It failed on {unit.key}: {_sentence(error)}"
            self.hooks.note(f"{entry.key}: {entry.reason}")
            return []
        record = {
            "key": unit.key,
            "family": unit.family,
            "method": entry.key,
            "repeat": repeat,
            "prompt_tokens": sum(map(len, prompts)),
            "tokens": count_tokens(found["ids"], self.facts["eos"], most),
        }
        return [record | found]


def _part(llm: Any, kind: str) -> Any:
    """The instance that was created, where its needs are its own."""
    return llm.drafter if kind == "drafter" else None


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ForetellError) else f"{type(error).__name__}: {error}"


def _weigh(
    system: System, entries: Sequence[Entry], groups: Sequence[Unit], s: Settings, hooks: Hooks
) -> None:
    """What drafters hold: all requests together after the run, a sequence at its end."""
    longest = max(groups, key=lambda u: len(u.prompts[0]))
    for entry in entries:
        if entry.reason or entry.kind not in ("drafter", "tree"):
            continue
        engine = system.ready[entry.key].engine
        drafter = engine.drafter
        tell = getattr(drafter, "state_bytes", None)
        weighed: Any = Weighed(drafter)
        try:
            entry.shared_bytes = int(tell()) if tell is not None else None
            engine.drafter = weighed
            system.run(entry.key, longest.prompts, s.max_tokens)
            entry.sequence_bytes = weighed.bytes
        except Exception as error:
            hooks.note(f"{entry.key}: its state could not be weighed: {_sentence(error)}")
        finally:
            engine.drafter = drafter


def _result(entry: Entry, figures: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        **entry.facts,
        "needs": entry.needs,
        "measured_as": entry.method.to_json() if entry.method else None,
        "reason": entry.reason or None,
        "shared_bytes": entry.shared_bytes,
        "sequence_bytes": entry.sequence_bytes,
        "by_family": None if entry.reason or not figures else dict(figures),
    }
