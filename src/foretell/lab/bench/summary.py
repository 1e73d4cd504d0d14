"""From raw records to figures. Pure: a list of dictionaries in, a dictionary out.

A record is one method on one prompt (or one group of prompts decoded together) in one repeat. Of
the repeats of a prompt the median counts. Speeds:

- decoding: tokens after the first step's, over the time after it;
- end to end: all tokens, over the whole call, prefill included.

Speeds of a family are total tokens over total time; speed-ups are geometric means of the ratios of
the same prompt, with a bootstrap interval over prompts.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from foretell.lab.bench.methods import PLAIN
from foretell.lab.bench.stats import bootstrap_ratio, geometric_mean, pooled_deviation, spread

Record = dict[str, Any]
OVERALL = "overall"
LOSSY = "lossy"


def decode_speed(r: Record) -> float | None:
    """Tokens a second after the first step; None where nothing came after it."""
    if r.get("first_s") is None or r.get("first_tokens") is None:
        return None
    tokens, seconds = r["tokens"] - r["first_tokens"], r["seconds"] - r["first_s"]
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def whole_speed(r: Record) -> float | None:
    return r["tokens"] / r["seconds"] if r["tokens"] > 0 and r["seconds"] > 0 else None


SPEEDS: Mapping[str, Callable[[Record], float | None]] = {
    "decode": decode_speed,
    "whole": whole_speed,
}


def stop_ids(ids: Sequence[int], stops: Iterable[int]) -> list[int]:
    """Ids before the one that ended the text: some systems return that one, others do not."""
    stops = frozenset(stops)
    end = next((i for i, t in enumerate(ids) if t in stops), len(ids))
    return list(ids[:end])


def count_tokens(answers: Sequence[Sequence[int]], stops: Iterable[int], most: int) -> int:
    """Tokens decoded, the one that ended a text included, whether it was returned or not."""
    stops = frozenset(stops)
    short = [stop_ids(a, stops) for a in answers]
    return sum(len(s) + (len(s) < most) for s in short)


def summarise(
    records: Iterable[Record],
    methods: Mapping[str, Mapping[str, Any]],
    stops: Iterable[int] = (),
    compare_ids: bool = True,
) -> dict[str, Any]:
    """methods: name -> facts (`system`, `promise`, ...), in the order of the tables.

    compare_ids: whether peers' ids are comparable with plain decoding's (they are not when
    sampling: every system has random numbers of its own).
    """
    table: dict[str, dict[str, list[Record]]] = {m: defaultdict(list) for m in methods}
    families: dict[str, str] = {}
    failed: dict[str, int] = defaultdict(int)
    for r in records:
        if r["method"] not in table:
            continue
        if r.get("error"):
            failed[r["method"]] += 1
            continue
        table[r["method"]][r["key"]].append(r)
        families[r["key"]] = r["family"]
    medians = {
        m: {k: {name: _median(f, rs) for name, f in SPEEDS.items()} for k, rs in by.items()}
        for m, by in table.items()
    }
    peers = [m for m, facts in methods.items() if facts.get("system") != "foretell"]
    order = list(dict.fromkeys(families.values()))
    reference = {k: _reference(rs, stops) for k, rs in table.get(PLAIN, {}).items()}
    result: dict[str, Any] = {"families": order, "methods": {}}
    for method, facts in methods.items():
        comparable = compare_ids or method not in peers
        entry: dict[str, Any] = {**facts, "failed": failed[method]}
        for family in [*order, OVERALL]:
            keys = [k for k in table[method] if family in (OVERALL, families[k])]
            if keys:
                entry.setdefault("by_family", {})[family] = _family(
                    method, keys, table, medians, peers, reference if comparable else {}, stops
                )
        entry["noise"] = _noise(table[method])
        entry["drift"] = drift(table[method])
        result["methods"][method] = entry
    return result


def _family(
    method: str,
    keys: list[str],
    table: Mapping[str, Mapping[str, list[Record]]],
    medians: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    peers: Sequence[str],
    reference: Mapping[str, list[list[int]]],
    stops: Iterable[int],
) -> dict[str, Any]:
    own = [r for k in keys for r in table[method][k]]
    first = [table[method][k][0] for k in keys]
    found: dict[str, Any] = {
        "prompts": sum(len(r["ids"]) for r in first),
        "tokens": sum(r["tokens"] for r in first),
        "ttft_ms": _milliseconds(r.get("ttft_s") for r in own),
        "prefill_ms": _milliseconds(r.get("first_s") for r in own),
        "prompt_tokens": sum(r["prompt_tokens"] for r in first),
    }
    for name in SPEEDS:
        mine = {k: medians[method][k][name] for k in keys}
        found[f"{name}_tokens_per_s"] = _pooled(mine, table[method])
        found[f"{name}_speedup"] = speedup(mine, medians.get(PLAIN, {}), name)
        found[f"{name}_over"] = {
            p: s for p in peers if p != method and (s := speedup(mine, medians[p], name))
        }
    spreads = [s for k in keys if (s := _spread(table[method][k])) is not None]
    found["spread"] = statistics.median(spreads) if spreads else None
    found.update(acceptance(own))
    found["equal"] = equality(method, keys, table[method], reference, stops)
    joules = [r["joules"] for r in own if r.get("joules") is not None]
    tokens = sum(r["tokens"] for r in own if r.get("joules") is not None)
    found["joules_per_token"] = sum(joules) / tokens if joules and tokens else None
    return found


def speedup(
    mine: Mapping[str, float | None],
    base: Mapping[str, Mapping[str, float | None]],
    name: str,
) -> dict[str, Any] | None:
    """Geometric mean of mine / base over the prompts both have, its 95 % interval, their number."""
    ratios = []
    for key, speed in mine.items():
        other = base.get(key, {}).get(name)
        if speed and other:
            ratios.append(speed / other)
    if not ratios:
        return None
    return {
        "ratio": geometric_mean(ratios),
        "interval": bootstrap_ratio(ratios),
        "prompts": len(ratios),
    }


def acceptance(records: Iterable[Record]) -> dict[str, Any]:
    """Per target step, over all steps: the length (bonus token included, 1 = plain decoding), the
    share of steps that accepted the draft at position 1, 2, ..., the share of those that accepted
    the one before it, and how many steps accepted 0, 1, 2, ... drafts. Null where unknown."""
    known = [r for r in records if r.get("steps")]
    steps = sum(r["steps"] for r in known)
    if not steps:
        nothing = ("acceptance_length", "acceptance_rate", "accepted_by_position")
        return dict.fromkeys((*nothing, "accepted_given_previous", "histogram", "drafted"))
    positions = _add(r.get("per_position") or [] for r in known)
    told = [r for r in known if r.get("drafted") is not None]
    drafted = sum(r["drafted"] for r in told)
    accepted = sum(sum(r.get("per_position") or []) for r in told)
    before = [steps, *positions]
    return {
        "acceptance_length": 1 + sum(positions) / steps,
        "acceptance_rate": accepted / drafted if drafted else None,
        "accepted_by_position": [n / steps for n in positions],
        "accepted_given_previous": [n / b for n, b in zip(positions, before, strict=False) if b],
        "histogram": _add(r.get("histogram") or [] for r in known),
        "drafted": drafted if told else None,
    }


def equality(
    method: str,
    keys: Iterable[str],
    table: Mapping[str, list[Record]],
    reference: Mapping[str, list[list[int]]],
    stops: Iterable[int],
) -> dict[str, Any] | None:
    """How many answers are those of plain decoding, over all repeats; where the others part."""
    same = compared = 0
    places = []
    for key in keys:
        for r in table[key] if key in reference else []:
            for n, (mine, right) in enumerate(zip(r["ids"], reference[key], strict=True)):
                compared += 1
                mine = stop_ids(mine, stops)
                if mine == right:
                    same += 1
                    continue
                pairs = enumerate(zip(mine, right, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(right)))
                places.append({"key": key, "prompt": n, "repeat": r["repeat"], "at": at})
    if not compared:
        return None
    return {"same": same, "compared": compared, "different": places[:50]}


def drift(by_key: Mapping[str, Sequence[Record]]) -> list[float]:
    """Log of the geometric-mean decoding speed of each repeat, over prompts that all have."""
    repeats = sorted({r["repeat"] for rs in by_key.values() for r in rs})
    logs: dict[int, list[float]] = {n: [] for n in repeats}
    for rs in by_key.values():
        speeds = {r["repeat"]: decode_speed(r) for r in rs}
        values = [speeds.get(n) for n in repeats]
        if all(values):
            for n, v in zip(repeats, values, strict=True):
                logs[n].append(math.log(v or 1.0))
    return [statistics.fmean(v) for v in logs.values() if v]


def _noise(by_key: Mapping[str, Sequence[Record]]) -> float | None:
    """Relative standard deviation of one measurement of one prompt."""
    groups = []
    for rs in by_key.values():
        groups.append([math.log(s) for r in rs if (s := decode_speed(r))])
    return pooled_deviation(groups)


def _reference(records: Sequence[Record], stops: Iterable[int]) -> list[list[int]]:
    first = min(records, key=lambda r: r["repeat"])
    return [stop_ids(a, stops) for a in first["ids"]]


def _median(f: Callable[[Record], float | None], records: Sequence[Record]) -> float | None:
    values = [v for r in records if (v := f(r)) is not None]
    return statistics.median(values) if values else None


def _spread(records: Sequence[Record]) -> float | None:
    values = [v for r in records if (v := decode_speed(r) or whole_speed(r))]
    return spread(values)


def _pooled(
    speeds: Mapping[str, float | None], table: Mapping[str, Sequence[Record]]
) -> float | None:
    """Total tokens over total time, the time of a prompt being its tokens over its median speed."""
    tokens = seconds = 0.0
    for key, speed in speeds.items():
        if speed:
            n = table[key][0]["tokens"]
            tokens, seconds = tokens + n, seconds + n / speed
    return tokens / seconds if seconds else None


def _milliseconds(seconds: Iterable[float | None]) -> float | None:
    values = [s * 1e3 for s in seconds if s is not None]
    return statistics.median(values) if values else None


def _add(rows: Iterable[Sequence[int]]) -> list[int]:
    total: list[int] = []
    for row in rows:
        total.extend([0] * (len(row) - len(total)))
        for i, n in enumerate(row):
            total[i] += n
    return total
