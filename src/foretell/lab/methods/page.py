"""The result of a run as a page of Markdown. Pure: a dictionary in, text out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from foretell.lab.bench.summary import OVERALL

Row = Mapping[str, Any]
NONE = "-"
TITLES = {
    "drafter": "Drafters",
    "tree": "Trees",
    "verifier": "Verification rules",
    "policy": "Length policies",
    "mode": "Modes",
}
NOTES = {
    "drafter": "`--draft NAME:key=value,...`. Measured greedily.",
    "tree": "`--draft draft-model:tree=NAME,key=value,...`; every tree keeps the promise of the "
    "rule. Measured greedily, with the model's own drafter.",
    "verifier": "`--verify NAME:key=value,...`. Tokens a step at temperature 1 on chains of "
    "`draft-model` with its default length, on which several rules coincide; "
    "[verification.md](verification.md) compares them on the drafts they are made for.",
    "policy": "`--policy NAME:key=value,...`; every policy keeps the promise of the rule. Measured "
    "greedily, with `draft-model:tokens=8`.",
}

LEGEND = (
    "**length**: tokens a step of the target, its own included (1 = plain decoding). "
    "**speed-up**: decoding speed over plain decoding's on the same prompt in the same run, "
    "medians over repeats, geometric mean over prompts, with its 95 % interval. **same**: answers "
    "that are token for token those of plain decoding. A family's cell is length and speed-up. "
    "**all**: bytes that all requests share after the run, **sequence**: the most that one "
    "sequence held (a KV cache of its own included); `-` where a method cannot tell. The figures "
    "are this model's and this text's: `foretell tune` finds yours."
)


def markdown(result: Mapping[str, Any], command: str) -> str:
    """The whole page; kinds come in the order of the registry."""
    parts = ["# Methods\n", _head(result, command)]
    rows = result["methods"]
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine = [r for r in rows if r["kind"] == kind]
        parts.append(f"## {TITLES.get(kind, kind.capitalize() + 's')}")
        parts.append(_fill(NOTES[kind]) + "\n" if kind in NOTES else "")
        parts.append(_what(kind, mine))
        parts.append(_measured(kind, mine, result["families"]))
        parts.append(_left_out(mine))
    return "\n".join(p for p in parts if p)


def _head(result: Mapping[str, Any], command: str) -> str:
    p = result["provenance"]
    s, m, w, others = p["settings"], p["machine"], p["workload"], p["others"]
    versions = p["versions"]
    gib = f", {m['memory_bytes'] / 2**30:.0f} GiB" if m.get("memory_bytes") else ""
    model = f"`{p['model']['name']}` (sha256 {p['model']['sha256'][:12]})"
    if p["model"].get("widened_from"):
        model += ", **widened**: its acceptance is that of the model it was made from"
    noise = ""
    if others:
        noise = (
            f" Meanwhile other processes used {others['other']:.0%} of the processors, and a host "
            f"took {others['steal']:.0%} away."
        )
    cut = f" ({p['cut']} lost their middle to fit into the context)" if p["cut"] else ""
    chat = "through the chat template" if p["chat_template"] else "without a chat template"
    commit = f" ({p['commit']})" if p["commit"] else ""
    what = (
        "Every registered method: what it is, what it needs, and what it did on one machine. "
        "Generated, not written, by"
    )
    where = (
        f"on {p['started']}: foretell {versions['foretell']}{commit}, torch "
        f"{versions.get('torch')}, Python {versions['python']}; {m['cpu']}, {m['usable_cores']} "
        f"cores{gib}, device {m['device']}, {s['threads']} thread{'s' * (s['threads'] > 1)}, "
        f"{s['dtype']}; {model}; {p['prompts']} prompts of {w['name']}{cut}, {chat}, at most "
        f"{s['max_tokens']} new tokens, batch 1, {s['repeats']} repeat{'s' * (s['repeats'] > 1)}."
        f"{noise}"
    )
    return "\n".join((_fill(what), f"\n    {command}\n", _fill(where), "", _fill(LEGEND), ""))


def _fill(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _what(kind: str, rows: Sequence[Row]) -> str:
    state = kind == "drafter"
    heads = ["name", "what it does", "promise", "needs", *(["all", "sequence"] if state else [])]
    if kind in ("tree", "policy"):
        heads.remove("promise")
    if not any(r["needs"] for r in rows):
        heads.remove("needs")
    lines = []
    for r in rows:
        cells = {
            "name": f"`{r['name']}`",
            "what it does": r["summary"],
            "promise": r["promise"],
            "needs": r["needs"] or NONE,
            "all": _bytes(r["shared_bytes"]),
            "sequence": _bytes(r["sequence_bytes"]),
            "paper": r["paper"] or NONE,
        }
        lines.append([cells[h] for h in (*heads, "paper")])
    return table([*heads, "paper"], lines)


def _measured(kind: str, rows: Sequence[Row], families: Sequence[str]) -> str:
    done = [r for r in rows if r["by_family"]]
    if not done:
        return ""
    timed = kind != "verifier"
    heads = ["measured as", "length", *(["speed-up", "same"] if timed else []), *families]
    lines = []
    for r in done:
        by, whole = r["by_family"], r["by_family"][OVERALL]
        cells = [f"`{r['measured_as']['name']}`", _length(whole)]
        if timed:
            cells += [_interval(whole), _same(whole)]
        for family in families:
            found = by.get(family)
            both = _length(found) if found else NONE
            if found and timed and found["decode_speedup"]:
                both += f" x{found['decode_speedup']['ratio']:.2f}"
            cells.append(both)
        lines.append(cells)
    return table(heads, lines)


def _left_out(rows: Sequence[Row]) -> str:
    lines = [f"- `{r['name']}`: {r['reason']}\n" for r in rows if r["reason"]]
    return "Not measured:\n\n" + "".join(lines) if lines else ""


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    cells = (" | ".join(" ".join(c.replace("|", "\\|").split()) for c in row) for row in rows)
    return "".join(f"| {row} |\n" for row in cells)


def _length(found: Row) -> str:
    value = found["acceptance_length"]
    return f"{value:.2f}" if value is not None else NONE


def _interval(found: Row) -> str:
    speedup = found["decode_speedup"]
    if not speedup:
        return NONE
    low, high = speedup["interval"] or (None, None)
    tail = f" ({low:.2f} to {high:.2f})" if low is not None else ""
    return f"x{speedup['ratio']:.2f}{tail}"


def _same(found: Row) -> str:
    equal = found["equal"]
    return f"{equal['same']} of {equal['compared']}" if equal else NONE


def _bytes(n: int | None) -> str:
    if n is None:
        return NONE
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"
