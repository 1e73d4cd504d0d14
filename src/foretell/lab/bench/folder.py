"""The folder of a run: opened, checked, filled. Files appear whole; records line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.lab.bench import png, report
from foretell.lab.bench.compare import read_records
from foretell.lab.bench.figures import charts


def open_run(out: Path, resume: bool) -> list[dict[str, Any]]:
    """Make the folder; the records of an earlier part of this run."""
    path = out / "records.jsonl"
    if not resume and path.is_file() and path.stat().st_size:
        raise InputError(f"{out} already holds a run: choose another --out, or add --resume.")
    out.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        path.touch()
        return []
    found = read_records(path.read_text("utf-8").splitlines(), out)
    # without a last line that an interruption cut short
    write_text(path, "".join(json.dumps(r) + "\n" for r in found))
    return found


def same_run(out: Path, source: Mapping[str, Any], resume: bool) -> None:
    """Refuse to mix figures that mean different things."""
    path = out / "provenance.json"
    if not resume or not path.is_file():
        return
    old = json.loads(path.read_bytes())
    for name in ("settings", "workloads", "model"):
        if old.get(name) == source[name]:
            continue
        keys = (
            [k for k in source[name] if old[name].get(k) != source[name][k]]
            if isinstance(source[name], dict)
            else []
        )
        what = f"{name} ({', '.join(keys)})" if keys else name
        raise InputError(
            f"--resume: the run in {out} had other {what}; use the same options or another --out."
        )


def write_reports(
    out: Path, summary: Mapping[str, Any], source: Mapping[str, Any]
) -> Iterator[str]:
    """Everything that is made of the records; yields what the user should know."""
    write_json(out / "provenance.json", source)
    write_json(out / "summary.json", summary)
    write_text(out / "summary.md", report.markdown(summary, source))
    write_text(out / "report.html", report.page(summary, source))
    if not png.available():
        yield "no PNG files: they need pip install 'foretell[bench]'"
        return
    for chart in charts(summary):
        png.draw(chart, out / f"{chart.name}.png")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
