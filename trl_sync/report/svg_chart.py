"""A chart as inline SVG; colours and fonts are the page's (style.py)."""

from __future__ import annotations

from collections.abc import Sequence

from trl_sync.report.axes import Axis, padded, tick_text, ticks
from trl_sync.report.curves import MOST_CURVES, Chart, Curve, Point
from trl_sync.report.text import count, escape, join, show

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 372, 10, 186
# Points of a curve that say their numbers under the mouse; all of them are seen if there are few.
MOST_DOTS = 60


def draw_chart(chart: Chart) -> str:
    """A figure: title, unit, legend with the last value of each curve, and the curves."""
    left_out = sum(curve.left_out for curve in chart.curves)
    text = f"{count(left_out, 'value')} not finite, left out."
    note = f'<p class="note">{text}</p>' if left_out else ""
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    return join(
        [
            '<figure class="chart">',
            f"<figcaption>{escape(chart.title)}{unit}</figcaption>",
            _legend(chart),
            _svg(chart),
            note,
            "</figure>",
        ]
    )


def _legend(chart: Chart) -> str:
    entries = []
    for curve in chart.curves:
        name = escape(curve.label, 60) if len(chart.curves) > 1 else "last"
        swatch = f'<i class="{_colour(curve)}"></i>' if len(chart.curves) > 1 else ""
        entries.append(f"<li>{swatch}{name} <b>{show(curve.points[-1][1])}</b></li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _svg(chart: Chart) -> str:
    xs = [x for curve in chart.curves for x, _ in curve.points]
    ys = [y for curve in chart.curves for _, y in curve.points]
    # One point lies in the middle; more fill the width.
    low, high = min(xs), max(xs)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-90):
        low, high = padded(low, high)
    across = Axis(low=low, high=high, start=LEFT, end=RIGHT)
    low, high = padded(min(ys), max(ys))
    up = Axis(low=low, high=high, start=BOTTOM, end=TOP)
    label = escape(f"{chart.title} against {chart.x_label}")
    return join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
            _grid(across, up, chart.x_label),
            *(_line(curve, across, up, chart.x_label) for curve in chart.curves),
            "</svg>",
        ]
    )


def _grid(across: Axis, up: Axis, x_label: str) -> str:
    parts = []
    heights = ticks(up.low, up.high)
    for number in heights:
        y = up.place(number)
        text = tick_text(number, _step(heights))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{escape(text)}</text>')
    places = ticks(across.low, across.high)
    for number in places:
        x = across.place(number)
        text = tick_text(number, _step(places))
        # The last one would stick out where it is centred.
        kind = "x end" if x > RIGHT - 16 else "x"
        x = min(x, RIGHT)
        parts.append(f'<text class="{kind}" x="{x:.1f}" y="{BOTTOM + 16}">{escape(text)}</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    parts.append(f'<text class="x" x="{middle:.0f}" y="{HEIGHT - 3}">{escape(x_label)}</text>')
    return join(parts)


def _step(numbers: Sequence[float]) -> float:
    return abs(numbers[1] - numbers[0]) if len(numbers) > 1 else max(abs(numbers[0]), 1e-90)


def _line(curve: Curve, across: Axis, up: Axis, x_label: str) -> str:
    places = [(across.place(x), up.place(y)) for x, y in curve.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    colour = _colour(curve)
    line = f'<path class="line {colour}" d="M{path}"/>' if len(places) > 1 else ""
    return join([line, _dots(curve.points, places, colour, x_label)])


def _dots(points: Sequence[Point], places: Sequence[Point], colour: str, x_label: str) -> str:
    every = -(-len(points) // MOST_DOTS)
    kind = f"dot {colour}" if every == 1 else "hit"
    radius = 2 if every == 1 else 5
    parts = []
    for (x, y), (across, up) in list(zip(points, places, strict=True))[::every]:
        said = f"{show(y)} at {show(x)} {x_label}"
        parts.append(
            f'<circle class="{kind}" cx="{across:.1f}" cy="{up:.1f}" r="{radius}">'
            f"<title>{escape(said)}</title></circle>"
        )
    return "".join(parts)


def _colour(curve: Curve) -> str:
    return f"c{curve.colour % MOST_CURVES + 1}"
