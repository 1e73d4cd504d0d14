"""A run as a table for a terminal, as Markdown, and as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from foretell.lab.bench.figures import charts
from foretell.lab.bench.methods import PLAIN
from foretell.lab.bench.summary import LOSSY, OVERALL
from foretell.lab.bench.svg import svg

Table = tuple[list[str], list[list[str]]]  # heads, rows


def main_table(summary: Mapping[str, Any], family: str = OVERALL) -> Table:
    """One row a method."""
    peak = "peak memory"
    heads = ["method", "tok/s", "speed-up", "95 %", "end to end", "length", "TTFT ms", peak, "same"]
    rows = []
    for method, entry in summary["methods"].items():
        f = entry.get("by_family", {}).get(family)
        if f is None:
            continue
        s = f["decode_speedup"]
        rows.append(
            [
                label(method, entry),
                _number(f["decode_tokens_per_s"], 1),
                _number(s and s["ratio"], 2),
                _interval(s),
                _number(f["whole_speedup"] and f["whole_speedup"]["ratio"], 2),
                _number(f["acceptance_length"], 2),
                _number(f["ttft_ms"], 1),
                size((entry.get("memory") or {}).get("peak")),
                same(f["equal"]),
            ]
        )
    return heads, rows


def family_table(summary: Mapping[str, Any]) -> Table:
    """Speed-ups (decoding) by family, acceptance length behind them."""
    families = [*summary["families"], OVERALL]
    rows = []
    for method, entry in summary["methods"].items():
        cells = [label(method, entry)]
        for family in families:
            f = entry.get("by_family", {}).get(family) or {}
            s = f.get("decode_speedup")
            length = f.get("acceptance_length")
            text = _number(s and s["ratio"], 2)
            cells.append(text + (f" ({length:.2f})" if length else ""))
        rows.append(cells)
    return ["method", *families], rows


def peer_table(summary: Mapping[str, Any], name: str = "decode") -> Table | None:
    """Our methods in rows, other systems in columns: how many times as fast we are."""
    peers = [m for m, e in summary["methods"].items() if e.get("system") != "foretell"]
    if not peers:
        return None
    rows = []
    for method, entry in summary["methods"].items():
        if method in peers:
            continue
        over = (entry.get("by_family", {}).get(OVERALL) or {}).get(f"{name}_over") or {}
        cells = []
        for p in peers:
            s = over.get(p)
            cells.append(f"{s['ratio']:.2f} [{_interval(s)}]" if s else "-")
        rows.append([label(method, entry), *cells])
    return ["times as fast as", *peers], rows


def phase_table(summary: Mapping[str, Any]) -> Table:
    """Prefill, noise, energy: what the main table has no room for."""
    heads = ["method", "end to end tok/s", "prefill ms", "prompt tok", "spread", "noise",
             "J/token", "anonymous", "mapped", "dtype"]  # fmt: skip
    rows = []
    for method, entry in summary["methods"].items():
        f = entry.get("by_family", {}).get(OVERALL)
        if f is None:
            continue
        memory = entry.get("memory") or {}
        rows.append(
            [
                label(method, entry),
                _number(f["whole_tokens_per_s"], 1),
                _number(f["prefill_ms"], 1),
                str(f["prompt_tokens"]),
                _percent(f["spread"]),
                _percent(entry["noise"]),
                _number(f["joules_per_token"], 3),
                size(memory.get("anonymous")),
                size(memory.get("mapped")),
                str(entry.get("dtype") or "-"),
            ]
        )
    return heads, rows


def label(method: str, entry: Mapping[str, Any]) -> str:
    """A method's name with everything a reader must not miss."""
    marks = []
    if method == PLAIN:
        marks.append("plain decoding")
    if entry.get("promise") == LOSSY:
        marks.append("LOSSY: changes the text")
    if entry.get("same_class") is False:
        marks.append(f"other dtype: {entry.get('dtype')}")
    if entry.get("failed"):
        marks.append(f"{entry['failed']} failed")
    return f"{method} ({'; '.join(marks)})" if marks else method


def headline(provenance: Mapping[str, Any]) -> list[str]:
    """What was measured, in sentences."""
    s, m, model = provenance["settings"], provenance["machine"], provenance["model"]
    widened = model.get("widened_from")
    lines = [
        f"Model {model.get('name') or model['path']} (sha256 {model['sha256'][:12]})"
        + (", WIDENED: a small model padded to the cost of a large one" if widened else "")
        + f"; {s['dtype']}, {s['threads']} threads, batch {s['batch']}, "
        + (f"temperature {s['temperature']:g}, seed {s['seed']}" if s["temperature"] else "greedy")
        + f", at most {s['max_tokens']} new tokens"
        + (", end of text ignored" if s["ignore_eos"] else "")
        + f"; {s['repeats']} repeats, methods in rotating order.",
        f"Machine: {m['cpu']}, {m['usable_cores']} cores"
        + (f" ({', '.join(m['flags'])})" if m["flags"] else "")
        + f", {size(m['memory_bytes'])} memory"
        + (f", reads {m['bandwidth'] / 1e9:.1f} GB/s" if m.get("bandwidth") else "")
        + (f", {m['device']}" if m.get("device") not in (None, "cpu") else "")
        + ".",
    ]
    for w in provenance["workloads"]:
        lines.append(f"Workload {w['name']}: {w['prompts']} prompts, sha256 {w['sha256'][:12]}.")
    lines += [f"Left out: {t}" for t in provenance.get("left_out") or []]
    lines += [f"WARNING: {t}" for t in provenance.get("warnings") or []]
    return lines


def sections(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Table]]:
    yield (
        "Overall",
        "tok/s counts decoding only (tokens after the first step); speed-ups are against our own "
        "plain decoding, geometric means over prompts with a 95 % bootstrap interval; length is "
        "tokens per target step, 1 = plain; same: answers equal to plain decoding's.",
        main_table(summary),
    )
    if len(summary["families"]) > 1:
        yield (
            "Speed-up by family",
            "Decoding speed over plain decoding; acceptance length in brackets.",
            family_table(summary),
        )
    for name, title in (("decode", "decoding"), ("whole", "end to end, prefill included")):
        table = peer_table(summary, name)
        if table is not None:
            yield (f"Against other systems, {title}", "Above 1: foretell is faster.", table)
    yield (
        "Phases, noise, energy, memory",
        "spread: (slowest - fastest) / median over the repeats of a prompt; noise: relative "
        "standard deviation of one measurement; memory of a process that runs this method alone.",
        phase_table(summary),
    )


def markdown(summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    out = ["# foretell bench", "", *(f"- {t}" for t in headline(provenance)), ""]
    for title, text, (heads, rows) in sections(summary):
        out += [f"## {title}", "", text, "", _row(heads), _row(["---"] * len(heads))]
        out += [*map(_row, rows), ""]
    out += ["`" + provenance["command"].replace("`", "'") + "`", ""]
    return "\n".join(out)


def terminal(summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    out = [*headline(provenance), ""]
    for title, _, (heads, rows) in sections(summary):
        widths = [max(len(r[i]) for r in [heads, *rows]) for i in range(len(heads))]
        out.append(f"{title}:")
        for r in [heads, *rows]:
            first, *rest = r
            cells = [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
            out.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        out.append("")
    return "\n".join(out).rstrip()


STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#6b7280;--rule:#d8dbe0;--back:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa2ad;--rule:#3a3f47;
--back:#16181c}}
body{margin:2rem auto;max-width:60rem;padding:0 1rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2.2rem}
p,li{color:var(--soft)}li.warning{color:#c2410c;font-weight:600}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto}svg text{fill:var(--ink);font:11px system-ui,sans-serif}
.grid{stroke:var(--rule)}.mark{stroke:var(--ink);stroke-dasharray:4 3}
.error{stroke:var(--ink)}.line{fill:none;stroke-width:2}
code,pre{font-size:.85rem;overflow-x:auto;white-space:pre-wrap}
"""


def page(summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """One HTML file: no script, no request to anybody."""
    import json

    out = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">',
        f"<title>foretell bench</title><style>{STYLE}</style></head><body><h1>foretell bench</h1>",
        "<ul>",
    ]
    for text in headline(provenance):
        mark = ' class="warning"' if text.startswith("WARNING") or "WIDENED" in text else ""
        out.append(f"<li{mark}>{escape(text)}</li>")
    out.append("</ul>")
    for title, text, (heads, rows) in sections(summary):
        out.append(f"<h2>{escape(title)}</h2><p>{escape(text)}</p>")
        out.append('<div class="wide"><table><tr>')
        out += [f"<th>{escape(h)}</th>" for h in heads]
        out.append("</tr>")
        for row in rows:
            out.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>")
        out.append("</table></div>")
    for chart in charts(summary):
        out.append(f"<h2>{escape(chart.title)}</h2>{svg(chart)}")
    out.append("<h2>Provenance</h2><details><summary>everything</summary><pre>")
    out.append(escape(json.dumps(provenance, indent=1)) + "</pre></details></body></html>")
    return "\n".join(out)


def same(equal: Mapping[str, Any] | None) -> str:
    return f"{equal['same']}/{equal['compared']}" if equal else "-"


def size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _interval(s: Mapping[str, Any] | None) -> str:
    span = s["interval"] if s else None
    return f"{span[0]:.2f}-{span[1]:.2f}" if span else "-"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
