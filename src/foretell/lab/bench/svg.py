"""Charts as SVG text, which a page can hold without asking anybody for anything."""

from __future__ import annotations

from html import escape

from foretell.lab.bench.figures import Chart, colour, ticks

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 300, 52, 12, 44


def svg(chart: Chart) -> str:
    """One <svg> element, legend included."""
    rows = -(-len(chart.series) // 3)
    height = HEIGHT + 18 * rows
    marks = ticks(chart.top)
    top = marks[-1]

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(chart.title)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    for mark in marks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y(mark)}" y2="{y(mark)}"/>')
        parts.append(_text(LEFT - 6, y(mark) + 4, f"{mark:g}", "end"))
    if chart.line is not None:
        at = y(chart.line)
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH}" y1="{at}" y2="{at}"/>')
    parts += _bars(chart, y) if chart.kind == "bars" else _lines(chart, y)
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 6, chart.x_label, "middle"))
    parts.append(
        f'<text x="12" y="{HEIGHT / 2 - 16}" text-anchor="middle" '
        f'transform="rotate(-90 12 {HEIGHT / 2 - 16})">{escape(chart.y_label)}</text>'
    )
    for i, name in enumerate(chart.series):
        x, at = LEFT + (i % 3) * (WIDTH - LEFT) / 3, HEIGHT + 12 + 18 * (i // 3)
        parts.append(f'<rect x="{x:.1f}" y="{at - 9}" width="10" height="10" fill="{colour(i)}"/>')
        shown = name if len(name) <= 36 else name[:35] + "…"
        parts.append(_text(x + 15, at, shown, "start"))
    return "\n".join([*parts, "</svg>"])


def _bars(chart: Chart, y) -> list[str]:  # y: value -> vertical place
    parts = []
    slot = (WIDTH - LEFT) / max(1, len(chart.x))
    each = slot * 0.8 / max(1, len(chart.series))
    for g, label in enumerate(chart.x):
        parts.append(_text(LEFT + (g + 0.5) * slot, HEIGHT - BOTTOM + 16, str(label), "middle"))
    for i, (name, points) in enumerate(chart.series.items()):
        spans = chart.errors.get(name) or [None] * len(points)
        for g, (value, span) in enumerate(zip(points, spans, strict=True)):
            if value is None:
                continue
            x = LEFT + g * slot + slot * 0.1 + i * each
            tip = f"{name}, {chart.x[g]}: {value:.3g}"
            parts.append(
                f'<rect x="{x:.1f}" y="{y(value):.1f}" width="{max(1.0, each - 1):.1f}" '
                f'height="{y(0) - y(value):.1f}" fill="{colour(i)}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            if span:
                at = x + each / 2
                parts.append(
                    f'<line class="error" x1="{at:.1f}" x2="{at:.1f}" y1="{y(span[0]):.1f}" '
                    f'y2="{y(span[1]):.1f}"/>'
                )
    return parts


def _lines(chart: Chart, y) -> list[str]:
    parts = []
    xs = [float(x) for x in chart.x]
    low, high = min(xs), max(xs)
    room = WIDTH - LEFT - 24

    def place(value: float) -> float:
        return LEFT + 12 + (room * (value - low) / (high - low) if high > low else room / 2)

    for value in xs:
        parts.append(_text(place(value), HEIGHT - BOTTOM + 16, f"{value:g}", "middle"))
    for i, (name, points) in enumerate(chart.series.items()):
        known = [(x, v) for x, v in zip(xs, points, strict=True) if v is not None]
        path = " ".join(f"{place(x):.1f},{y(v):.1f}" for x, v in known)
        parts.append(f'<polyline class="line" points="{path}" stroke="{colour(i)}"/>')
        for x, v in known:
            tip = f"{name}, {x:g}: {v:.3g}"
            parts.append(
                f'<circle cx="{place(x):.1f}" cy="{y(v):.1f}" r="3.5" fill="{colour(i)}">'
                f"<title>{escape(tip)}</title></circle>"
            )
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
