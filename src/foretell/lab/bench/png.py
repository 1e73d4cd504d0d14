"""Charts as PNG files, by matplotlib (`pip install 'foretell[bench]'`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from foretell.lab.bench.figures import Chart, colour


def available() -> bool:
    return find_spec("matplotlib") is not None


def draw(chart: Chart, path: Path) -> None:
    """Write one chart; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    for i, (name, points) in enumerate(chart.series.items()):
        at = [k for k, v in enumerate(points) if v is not None]
        values = [v for v in points if v is not None]
        if chart.kind == "lines":
            axes.plot([float(chart.x[k]) for k in at], values, "o-", color=colour(i), label=name)
            continue
        width = 0.8 / len(chart.series)
        places = [k - 0.4 + (i + 0.5) * width for k in at]
        axes.bar(places, values, width * 0.95, color=colour(i), label=name)
        spans = chart.errors.get(name) or []
        for place, k in zip(places, at, strict=True):
            span = spans[k] if spans else None
            if span:
                axes.plot([place, place], span, color="black", linewidth=1)
    if chart.kind == "bars":
        labels = [str(x) for x in chart.x]
        crowded = sum(map(len, labels)) > 90
        axes.set_xticks(range(len(labels)), labels)
        axes.tick_params(axis="x", rotation=25 if crowded else 0)
    if chart.line is not None:
        axes.axhline(chart.line, color="black", linewidth=1, linestyle="--")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=120)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
