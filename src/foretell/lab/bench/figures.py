"""The charts of a run as plain data; `svg` and `png` draw them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foretell.lab.bench.methods import PLAIN
from foretell.lab.bench.summary import OVERALL

Points = list[float | None]


@dataclass(slots=True)
class Chart:
    """Bars (groups along x, one bar a series) or lines (numbers along x)."""

    name: str  # file name
    title: str
    kind: str  # "bars" or "lines"
    x: list[str] | list[float]
    series: dict[str, Points]
    x_label: str = ""
    y_label: str = ""
    errors: dict[str, list[tuple[float, float] | None]] = field(default_factory=dict)
    line: float | None = None  # a horizontal mark

    @property
    def top(self) -> float:
        values = [v for points in self.series.values() for v in points if v is not None]
        values += [e[1] for spans in self.errors.values() for e in spans if e]
        return max([*values, self.line or 0.0, 1e-9])


def charts(summary: Mapping[str, Any]) -> list[Chart]:
    """Those for which there are data."""
    found = [
        _speedups(summary),
        _positions(summary),
        _histogram(summary),
        _forward(summary.get("forward_curve")),
    ]
    return [c for c in found if c is not None and c.series]


def _speedups(summary: Mapping[str, Any]) -> Chart | None:
    families = [*summary["families"], OVERALL]
    if len(families) == 2:
        families = [OVERALL]
    chart = Chart(
        "speedup",
        "Decoding speed over our plain decoding",
        "bars",
        _short(families),
        {},
        "",
        "times plain",
        {},
        1.0,
    )
    for method, entry in summary["methods"].items():
        if method == PLAIN:
            continue
        found = [_at(entry, family, "decode_speedup") for family in families]
        if any(found):
            chart.series[method] = [s["ratio"] if s else None for s in found]
            chart.errors[method] = [
                tuple(s["interval"]) if s and s["interval"] else None for s in found
            ]
    return chart


def _short(families: list[str]) -> list[str]:
    """Without the workload's name where the rest says enough."""
    tails = [f.rpartition("/")[2] for f in families]
    return tails if len(set(tails)) == len(tails) else families


def _positions(summary: Mapping[str, Any]) -> Chart | None:
    series = {}
    for method, entry in summary["methods"].items():
        shares = _at(entry, OVERALL, "accepted_by_position")
        if shares:
            series[method] = shares[:32]
    width = max((len(s) for s in series.values()), default=0)
    return Chart(
        "acceptance",
        "Share of target steps that accept the draft at a position",
        "lines",
        [float(i + 1) for i in range(width)],
        {m: [*s, *[None] * (width - len(s))] for m, s in series.items()},
        "draft position",
        "share of steps",
    )


def _histogram(summary: Mapping[str, Any]) -> Chart | None:
    series = {}
    for method, entry in summary["methods"].items():
        counts = _at(entry, OVERALL, "histogram")
        if method != PLAIN and counts and sum(counts):
            series[method] = [n / sum(counts) for n in counts]
    width = min(17, max((len(s) for s in series.values()), default=0))
    for method, shares in series.items():
        whole = [*shares, *[0.0] * (width - len(shares))]
        series[method] = [*whole[: width - 1], sum(whole[width - 1 :])]  # the rest in the last
    labels = [str(i) for i in range(width)]
    if any(len(s) > width for s in series.values()):
        labels[-1] += "+"
    return Chart(
        "accepted",
        "Drafted tokens accepted in a target step",
        "bars",
        labels,
        series,
        "tokens accepted",
        "share of steps",
    )


def _forward(curve: Mapping[str, Any] | None) -> Chart | None:
    if not curve:
        return None
    return Chart(
        "forward",
        f"T(n): a target forward of n rows behind {curve['context']} committed ones",
        "lines",
        [float(n) for n in curve["rows"]],
        {"milliseconds": list(curve["ms"])},
        "rows",
        "ms",
    )


def _at(entry: Mapping[str, Any], family: str, key: str) -> Any:
    return entry.get("by_family", {}).get(family, {}).get(key)


COLOURS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951",
    "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0",
    "#0b7a75", "#b80c5e", "#7a7a00", "#1d2f6f", "#e0a3a3",
)  # fmt: skip


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def ticks(top: float, wanted: int = 5) -> list[float]:
    """Round numbers from 0 to at least `top`."""
    import math

    raw = top / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]
