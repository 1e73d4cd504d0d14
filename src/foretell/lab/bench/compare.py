"""Do two runs differ beyond noise?

Per method, over the prompts both runs have: d = the mean of log(speed in B / speed in A), each
speed the median of its repeats. Its uncertainty has two sources: prompts react differently (the
standard error of d over prompts), and the machine drifts between one pass and the next (the
deviation of the passes' means within each run). A method differs when the interval around d, made
of both and widened for the number of methods tested, excludes 0, and d is larger than a smallest
effect that one cares about. A signed-rank test is reported beside it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.lab.bench.methods import PLAIN
from foretell.lab.bench.stats import t_quantile, wilcoxon
from foretell.lab.bench.summary import Record, decode_speed, drift, stop_ids, whole_speed

Times = dict[str, dict[str, list[Record]]]  # method -> key -> records


@dataclass(slots=True)
class Run:
    """What `foretell bench` left in a folder."""

    folder: Path
    provenance: dict[str, Any]
    records: list[Record]

    @classmethod
    def read(cls, folder: Path) -> Run:
        try:
            provenance = json.loads((folder / "provenance.json").read_bytes())
            lines = (folder / "records.jsonl").read_text("utf-8").splitlines()
        except (OSError, ValueError):
            raise InputError(
                f"{folder} holds no run of foretell bench (provenance.json and records.jsonl)."
            ) from None
        records = read_records(lines, folder)
        if not records:
            raise InputError(f"{folder} holds no records.")
        return cls(folder, provenance, records)


def read_records(lines: Iterable[str], folder: Path) -> list[Record]:
    """A last line that an interruption cut short is left out; any other bad line is an error."""
    found, broken = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if broken:
            raise InputError(f"Line {broken} of {folder / 'records.jsonl'} is no record.")
        try:
            record = json.loads(line)
            if not {"method", "key", "repeat"} <= record.keys():
                raise ValueError
            found.append(record)
        except (ValueError, AttributeError):
            broken = number
    return found


@dataclass(slots=True)
class Difference:
    """B against A for one method. ratio > 1: B is faster."""

    method: str
    prompts: int
    ratio: float
    low: float
    high: float
    noise: float | None  # half-width, in log speed, that drift of the machine alone explains
    p_value: float | None  # signed-rank test over prompts
    differs: bool
    changed: int  # prompts whose text is another one in B

    def sentence(self) -> str:
        change = f"{abs(self.ratio - 1):.1%} {'faster' if self.ratio > 1 else 'slower'}"
        span = f"(95 %: {self.low:.3f} to {self.high:.3f} times A's speed, {self.prompts} prompts)"
        if self.differs:
            text = f"{self.method}: B is {change} than A {span}."
        else:
            text = f"{self.method}: no difference beyond noise; B reads {change} {span}."
        if self.noise is None:
            text += " One repeat only, so drift of the machine is unknown."
        if self.changed:
            text += f" The text differs on {self.changed} of {self.prompts} prompts."
        return text


@dataclass(slots=True)
class Comparison:
    differences: list[Difference]
    notes: list[str]

    @property
    def differs(self) -> bool:
        return any(d.differs for d in self.differences)

    def to_json(self) -> dict[str, Any]:
        return {
            "differs": self.differs,
            "methods": [asdict(d) for d in self.differences],
            "notes": self.notes,
        }


def compare(
    a: Run,
    b: Run,
    smallest: float = 0.02,
    relative: bool = False,
    whole: bool = False,
) -> Comparison:
    """smallest: relative change below which nobody cares. relative: compare the speed-ups over each
    run's own plain decoding, for runs made on different machines. whole: end-to-end speeds."""
    ta, tb = _table(a.records), _table(b.records)
    shared = [m for m in ta if m in tb and set(ta[m]) & set(tb[m])]
    if relative:
        if PLAIN not in shared:
            raise InputError("--relative needs plain decoding ('none') in both runs.")
        shared.remove(PLAIN)
    if not shared:
        raise InputError(f"{a.folder} and {b.folder} share no method on the same prompt.")
    stops = a.provenance.get("stop_ids") or []
    found = []
    for method in shared:
        d = _difference(method, ta, tb, len(shared), smallest, relative, whole, stops)
        if d is not None:
            found.append(d)
    if not found:
        raise InputError("No prompt was decoded long enough in both runs to have a speed.")
    return Comparison(found, notes(a, b, [m for m in {**ta, **tb} if m not in shared], relative))


def _difference(
    method: str,
    ta: Times,
    tb: Times,
    tests: int,
    smallest: float,
    relative: bool,
    whole: bool,
    stops: Sequence[int],
) -> Difference | None:
    speed = whole_speed if whole else decode_speed

    def median(table: Times, name: str, key: str) -> float | None:
        values = [v for r in table.get(name, {}).get(key, []) if (v := speed(r))]
        return statistics.median(values) if values else None

    logs, changed, keys = [], 0, []
    for key in ta[method]:
        if key not in tb[method]:
            continue
        one, other = median(ta, method, key), median(tb, method, key)
        if relative and one and other:
            base, basis = median(ta, PLAIN, key), median(tb, PLAIN, key)
            one, other = one / base if base else None, other / basis if basis else None
        if not one or not other:
            continue
        logs.append(math.log(other / one))
        keys.append(key)
        texts = [[stop_ids(i, stops) for i in t[method][key][0]["ids"]] for t in (ta, tb)]
        changed += texts[0] != texts[1]
    if not logs:
        return None
    n, d = len(logs), statistics.fmean(logs)
    by_prompt = (statistics.variance(logs) / n, n - 1) if n > 1 else (0.0, 0)
    parts = [by_prompt]
    by_drift = None
    if not whole:
        names = (method, PLAIN) if relative else (method,)
        passes = [
            drift({k: t[m][k] for k in keys if k in t.get(m, {})}) for t in (ta, tb) for m in names
        ]
        if all(len(p) > 1 for p in passes):
            for p in passes:
                # a pass stands for one moment of the machine; the runs are other moments, so the
                # deviation of single passes counts, not that of their mean
                parts.append((statistics.variance(p), len(p) - 1))
            by_drift = sum(v for v, _ in parts[1:])
    variance = sum(v for v, _ in parts)
    freedom = _welch(parts)
    wide = t_quantile(1 - 0.025 / tests, freedom) * math.sqrt(variance) if freedom else math.inf
    half = t_quantile(0.975, freedom) * math.sqrt(variance) if freedom else math.inf
    differs = abs(d) > wide and abs(d) > math.log1p(smallest)
    return Difference(
        method,
        n,
        math.exp(d),
        math.exp(d - half) if half < 50 else 0.0,
        math.exp(d + half) if half < 50 else math.inf,
        None if by_drift is None else 1.96 * math.sqrt(by_drift),
        wilcoxon(logs),
        differs,
        changed,
    )


def _welch(parts: Sequence[tuple[float, int]]) -> float:
    """Degrees of freedom of a sum of variances (Welch and Satterthwaite)."""
    total = sum(v for v, _ in parts)
    known = [(v, f) for v, f in parts if f > 0]
    if not known:
        return 0.0
    below = sum(v * v / f for v, f in known)
    return total * total / below if below > 0 else float(max(f for _, f in known))


def _table(records: Iterable[Record]) -> Times:
    table: Times = defaultdict(lambda: defaultdict(list))
    for r in records:
        if not r.get("error"):
            table[r["method"]][r["key"]].append(r)
    return table


MATTERS: Mapping[str, str] = {
    "machine.cpu": "processors",
    "settings.threads": "threads",
    "settings.dtype": "dtypes",
    "settings.batch": "batch sizes",
    "settings.temperature": "temperatures",
    "settings.max_tokens": "lengths",
    "settings.ignore_eos": "stopping rules",
    "model.sha256": "models",
}


def notes(a: Run, b: Run, alone: Sequence[str], relative: bool) -> list[str]:
    """What the reader must know before believing the numbers."""
    found = []
    for path, what in MATTERS.items():
        one, other = (_at(r.provenance, path) for r in (a, b))
        if one != other:
            found.append(f"The runs have different {what}: {one} and {other}.")
    if not relative and _at(a.provenance, "machine.cpu") != _at(b.provenance, "machine.cpu"):
        found.append("--relative compares speed-ups, which suits different machines better.")
    for run in (a, b):
        found += [f"{run.folder.name}: {text}" for text in run.provenance.get("warnings") or []]
    if alone:
        found.append(f"Only one of the runs has: {', '.join(alone)}.")
    return found


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
