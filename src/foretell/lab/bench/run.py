"""One run: load everything, take turns, keep every record, sum up.

Order: for each repeat, for each prompt, every method once; which one begins moves on with every
prompt, so that no method always has the cold or the warm place. Before each timed call the same
method decodes a few tokens of a short prompt, so that its threads are awake and its weights are in
the caches whoever ran before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.core.places import cache_folder
from foretell.lab.bench import folder, machine, prompts, provenance
from foretell.lab.bench.methods import PLAIN
from foretell.lab.bench.process import WorkerFailed
from foretell.lab.bench.prompts import Prompt, Unit
from foretell.lab.bench.summary import count_tokens, summarise
from foretell.lab.bench.systems import OWN, Hooks, Settings, Systems, usable
from foretell.lab.bench.workloads import Workload

WARM_TOKENS = 24
CURVE = (1, 2, 4, 8, 16)
BUSY, STOLEN = 0.05, 0.02  # shares of the processors from which others are reported
SHOWN = ("system", "promise", "dtype", "version", "same_class", "memory")


@dataclass(slots=True)
class Bench:
    """`measure` makes a run in the folder `out`, or goes on with one."""

    settings: Settings
    workloads: Sequence[Workload]
    out: Path
    resume: bool = False
    hooks: Hooks = field(default_factory=Hooks)
    exports: Path = field(default_factory=lambda: cache_folder("bench"))

    systems: Systems = field(init=False)
    source: dict[str, Any] = field(init=False, default_factory=dict)  # the provenance
    warnings: list[str] = field(init=False, default_factory=list)

    def measure(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(summary, provenance), which also lie in `out`."""
        records = folder.open_run(self.out, self.resume)
        before, hardware = machine.Ticks.now(), machine.hardware()
        with Systems(self.settings, self.exports, self.hooks) as systems:
            self.systems = systems
            self._provenance(systems.start_own(), hardware)
            folder.same_run(self.out, self.source, self.resume)
            systems.start_peers()
            self.source["systems"] = systems.loaded
            folder.write_json(self.out / "provenance.json", self.source)
            texts = self._prompts()
            units = prompts.units(texts, self.settings.batch)
            self._warm_up(units)
            self._take_turns(units, records)
            curve = self._curve()
            after = machine.Ticks.now(systems.pids)
        if before is not None and after is not None:
            self.source["others"] = after.since(before)
            self._noise_warnings(self.source["others"], hardware)
        self._memory(units)
        return self._finish(records, curve, len(texts))

    def _prompts(self) -> list[Prompt]:
        path = self.out / "prompts.jsonl"
        if self.resume and path.is_file():
            return prompts.read(path)
        s, worker, facts = self.settings, self.systems.own.worker, self.systems.loaded[OWN]
        items = [(i, self._family(w, i.family)) for w in self.workloads for i in w.items]
        if any(i.ids is not None for i, _ in items):
            self.warnings.append("Prompts were given as token ids, not as text.")
        room = facts["max_positions"] - s.max_tokens
        context = f"the model's context of {facts['max_positions']}"
        if room < 1:
            raise InputError(
                f"--max-tokens {s.max_tokens} leaves no room for prompts in {context}."
            )

        def plain(ids: list[int]) -> list[int]:
            out = usable(worker, "run", mode=PLAIN, prompts=[ids], max_tokens=s.max_tokens)
            return out["ids"][0]

        texts, skipped = prompts.encode_items(
            items,
            lambda do, **a: usable(worker, do, **a),
            plain,
            chat=s.chat and facts["chat"],
            room=room,
            cut=s.cut,
            advance=self.hooks.stage("prompts", len(items)),
        )
        if not texts:
            raise InputError(
                f"No prompt of this workload fits {context} beside {s.max_tokens} new tokens: "
                "--fit cut shortens prompts."
            )
        for family, n in skipped.items():
            self.systems.left_out.append(f"{n} prompts of {family}, longer than {room} tokens.")
        changed = sum(1 for p in texts if p.cut)
        if changed:
            self.warnings.append(f"{changed} prompts lost their middle to fit into the context.")
        prompts.write(path, texts)
        return texts

    def _family(self, workload: Workload, family: str) -> str:
        """Families of several workloads are told apart by the workload's name."""
        single = len(self.workloads) == 1 or family == workload.name
        return family if single else f"{workload.name}/{family}"

    def _warm_up(self, units: Sequence[Unit]) -> None:
        advance = self.hooks.stage("warming up", len(self.systems.places))
        for name in self.systems.places:
            try:
                for _ in range(2):
                    tokens = min(WARM_TOKENS, self.settings.max_tokens)
                    self.systems.run(name, units[0].prompts, tokens)
            except WorkerFailed as error:
                raise InputError(f"{name} cannot decode: {error}") from None
            advance(1)

    def _take_turns(self, units: Sequence[Unit], records: list[dict[str, Any]]) -> None:
        s, names = self.settings, list(self.systems.places)
        done = {(r["method"], r["key"], r["repeat"]) for r in records}
        advance = self.hooks.stage("measuring", len(units) * len(names) * s.repeats)
        energy = machine.Energy()
        with (self.out / "records.jsonl").open("a", encoding="utf-8") as file:
            for repeat in range(s.repeats):
                self.systems.fresh()
                for n, unit in enumerate(units):
                    first = (n + repeat) % len(names)
                    for at, name in enumerate(names[first:] + names[:first]):
                        gone = self.systems.places[name].dead
                        if not gone and (name, unit.key, repeat) not in done:
                            record = self._record(name, unit, repeat, at, energy)
                            records.append(record)
                            file.write(json.dumps(record) + "\n")
                            file.flush()
                        advance(1)

    def _record(
        self, name: str, unit: Unit, repeat: int, at: int, energy: machine.Energy
    ) -> dict[str, Any]:
        s, place = self.settings, self.systems.places[name]
        record: dict[str, Any] = {
            "key": unit.key,
            "family": unit.family,
            "method": name,
            "repeat": repeat,
            "order": at,
            "at": round(time.time(), 3),
            "prompt_tokens": sum(map(len, unit.prompts)),
        }
        pids = (place.worker.pid,)
        ticks, joules = machine.Ticks.now(pids), energy.read()
        try:
            found = self.systems.run(name, unit.prompts, s.max_tokens)
        except WorkerFailed as error:
            if error.dead and place.facts["system"] == OWN:
                raise
            if error.dead:
                gone = self.systems.bury(place.worker)
                self.warnings.append(f"{', '.join(gone)} ended during the run: {error}")
            return {**record, "error": str(error)}
        later = machine.Ticks.now(pids)
        record["tokens"] = count_tokens(found["ids"], self.source["stop_ids"], s.max_tokens)
        record["joules"] = energy.joules(joules, energy.read())
        if ticks is not None and later is not None:
            record["others"] = later.since(ticks)
        return record | found

    def _curve(self) -> dict[str, Any] | None:
        if not self.settings.curve:
            return None
        self.hooks.note("timing forwards")
        worker = self.systems.own.worker
        try:
            self.source["machine"]["bandwidth"] = worker.ask("bandwidth")
            return worker.ask("curve", rows=list(CURVE), context=256, repeats=9)
        except WorkerFailed as error:  # the records are worth more than this
            self.warnings.append(f"Forwards could not be timed: {error}")
            return None

    def _memory(self, units: Sequence[Unit]) -> None:
        if not self.settings.memory:
            return
        longest = max(units, key=lambda u: sum(map(len, u.prompts)))
        advance = self.hooks.stage("memory", len(self.systems.places))
        for name, wrong in self.systems.memory(longest.prompts):
            if wrong is not None:
                self.warnings.append(f"The memory of {name} could not be measured: {wrong}")
            advance(1)

    def _provenance(self, facts: Mapping[str, Any], hardware: dict[str, Any]) -> None:
        draft = self.systems.draft_folder()
        settings = self.settings.to_json() | {"dtype": facts["dtype"], "device": facts["device"]}
        described = provenance.describe_model(Path(facts["folder"]))
        self.source = {
            "command": provenance.command(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": provenance.commit(),
            "versions": provenance.versions(),
            "settings": settings,
            "model": {"name": facts["name"], **described},
            "draft": provenance.describe_model(draft) if draft and draft.is_dir() else None,
            "workloads": [w.to_json() for w in self.workloads],
            "machine": {**hardware, "device": facts["device"]},
            "environment": provenance.environment(),
            "stop_ids": [] if self.settings.ignore_eos else facts["eos"],
            "chat_template": self.settings.chat and facts["chat"],
        }

    def _noise_warnings(self, others: Mapping[str, float], hardware: Mapping[str, Any]) -> None:
        if others["other"] > BUSY:
            text = f"Other processes used {others['other']:.0%} of the processors during the run."
            self.warnings.append(text)
        if others["steal"] > STOLEN:
            text = f"The virtual machine's host took {others['steal']:.0%} of the processors away."
            self.warnings.append(text)
        load = hardware.get("load_average")
        if load and load[0] > 0.5 * (hardware.get("usable_cores") or 1):
            self.warnings.append(f"The machine was busy at the start (load {load[0]:g}).")
        if self.settings.repeats < 3:
            self.warnings.append("Fewer than three repeats: the spread says little.")

    def _finish(
        self, records: list[dict[str, Any]], curve: dict[str, Any] | None, count: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        facts = {
            name: {k: place.facts.get(k) for k in SHOWN}
            for name, place in self.systems.places.items()
        }
        greedy = self.settings.temperature == 0
        summary = summarise(records, facts, self.source["stop_ids"], compare_ids=greedy)
        summary |= {"forward_curve": curve, "prompts": count}
        self.source |= {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "load_average_after": machine.load_average(),
            "left_out": self.systems.left_out,
            "warnings": self.warnings,
        }
        for text in folder.write_reports(self.out, summary, self.source):
            self.hooks.note(text)
        return summary, self.source
