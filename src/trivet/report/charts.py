"""Small drawings as SVG that takes its colours from the page, light or dark. Every text is escaped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]

_WIDE, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 52, 12, 10, 36
#: Points that are drawn of a curve; longer ones are drawn as means of as many stretches.
_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One curve: `kind` is line, dots (with a line) or steps; `colour` an index into the page's colours, from 1."""

    name: str
    points: Sequence[Point]
    kind: str = "line"
    colour: int = 1


def line_chart(
    series: Sequence[Series], *, label: str, across: str = "step", wide: int = _WIDE, high: int = 230,
    log: bool = False, zero: bool = False,
) -> Markup:  # fmt: skip
    """Curves over steps.

    Args:
        label: what the vertical axis shows.
        across: what the horizontal axis shows.
        wide, high: in the drawing's units; a text is 12 high.
        log: a logarithmic vertical axis; values of 0 and below are left out.
        zero: the vertical axis begins at 0.
    """
    shown = [Series(s.name, thinned(_finite(s.points, log), s.kind), s.kind, s.colour) for s in series]
    shown = [s for s in shown if s.points]
    if not shown:
        return Markup('<p class="none">nothing to draw yet</p>')
    xs, ys = ([p[i] for s in shown for p in s.points] for i in (0, 1))
    ticks = log_ticks(min(ys), max(ys)) if log else nice_ticks(0 if zero else min(ys), max(ys), 5)
    across_ticks = [t for t in nice_ticks(min(0, *xs), max(xs), 6) if t <= max(xs) * 1.0001]
    low, top = min(*ys, ticks[0]), max(*ys, ticks[-1])

    def x(value: float) -> float:
        return _LEFT + (value - min(0, *xs)) / ((max(xs) - min(0, *xs)) or 1) * (wide - _LEFT - _RIGHT)

    def y(value: float) -> float:
        if log:
            value, floor, ceiling = (math.log10(v) for v in (value, low, top))
        else:
            floor, ceiling = low, top
        return high - _BOTTOM - (value - floor) / ((ceiling - floor) or 1) * (high - _BOTTOM - _TOP)

    out = [_open(wide, high, f"{label} by {across}: {', '.join(s.name for s in shown)}")]
    for tick in ticks:
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{wide - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{escape(short(tick))}</text>')
    for tick in across_ticks:
        out.append(f'<text class="tick mid" x="{x(tick):.1f}" y="{high - _BOTTOM + 17}">{escape(short(tick))}</text>')
    out.append(f'<text class="axis mid" x="{(_LEFT + wide - _RIGHT) / 2}" y="{high - 4}">{escape(across)}</text>')
    for s in shown:
        out.append(_curve(s, [(x(a), y(b)) for a, b in s.points]))
    return Markup("".join([*out, "</svg>", str(_legend(shown, label))]))  # noqa: S704 - escaped above


def _curve(series: Series, points: Sequence[Point]) -> str:
    if series.kind == "steps":
        corners = [p for (x0, y0), (x1, _) in itertools.pairwise(points) for p in ((x0, y0), (x1, y0))]
        points = [*corners, points[-1]]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    out = f'<path class="line c{series.colour}" d="{path}"/>'
    if series.kind == "dots" or len(points) == 1:
        out += "".join(f'<circle class="dot c{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in points)
    return out


def _legend(series: Sequence[Series], label: str) -> Markup:
    if len(series) == 1:
        return Markup('<p class="legend"><span class="key what"><i class="c{}"></i>{}</span></p>').format(
            series[0].colour, label
        )
    items = [Markup('<span class="key"><i class="c{}"></i>{}</span>').format(s.colour, s.name) for s in series]
    return Markup('<p class="legend"><span class="what">{}</span> {}</p>').format(label, Markup(" ").join(items))


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[int, int], float], *, across: str, unit: str
) -> Markup:
    """Cells whose strength is their value; cells of 0 are outlined, and what isn't there is left out.

    Args:
        rows, columns: their names; of the columns' only as many are written as there is room for.
        values: by (row, column) index.
        across: what the columns are.
        unit: what the values are, for the cells' hints and the scale.
    """
    if not values:
        return Markup('<p class="none">nothing to draw yet</p>')
    label = min(176, 14 + 7.2 * max(map(len, rows)))
    wide, tall = (_WIDE - label - _RIGHT) / len(columns), 22
    high = 8 + tall * len(rows) + 36
    most = max(values.values()) or 1.0
    out = [_open(_WIDE, high, f"{unit} by {across}")]
    for i, name in enumerate(rows):
        shown = name if len(name) <= 24 else f"…{name[-23:]}"
        out.append(f'<text class="tick end" x="{label - 6:.0f}" y="{8 + tall * i + 15}">{escape(shown)}</text>')
    every = max(1, math.ceil(len(columns) * 26 / (_WIDE - label)))
    for j in range(0, len(columns), every):
        x = label + wide * (j + 0.5)
        out.append(f'<text class="tick mid" x="{x:.1f}" y="{high - 21}">{escape(columns[j])}</text>')
    gap = 1.0 if wide > 4 else 0.2
    for (i, j), value in sorted(values.items()):
        place = f'x="{label + wide * j:.2f}" y="{8 + tall * i}" width="{wide - gap:.2f}" height="{tall - 1}"'
        hint = f"<title>{escape(f'{rows[i]}, {across} {columns[j]}: {unit} {value:.4g}')}</title>"
        style = f'class="cell" fill-opacity="{0.08 + 0.92 * value / most:.3f}"' if value else 'class="empty"'
        out.append(f"<rect {style} {place}>{hint}</rect>")
    out.append(f'<text class="axis mid" x="{(label + _WIDE - _RIGHT) / 2:.0f}" y="{high - 4}">{escape(across)}</text>')
    scale = Markup('<p class="legend"><span class="what">{}</span> 0 <span class="scale"></span> {}</p>')
    return Markup("".join([*out, "</svg>", str(scale.format(unit, short(most)))]))  # noqa: S704 - escaped above


def interval_bar(low: float, high: float, value: float, *, good: bool | None) -> Markup:
    """A difference with its interval on a line through 0."""
    reach = max(abs(low), abs(high), abs(value)) * 1.15 or 1.0

    def x(v: float) -> float:
        return 60 + 56 * v / reach

    kind = {True: "good", False: "bad", None: "unclear"}[good]
    drawing = (
        f'<svg class="interval {kind}" viewBox="0 0 120 16" role="img" aria-label="{low:.3g} to {high:.3g}">'
        '<line class="zero" x1="60" x2="60" y1="1" y2="15"/>'
        f'<line class="range" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="8" y2="8"/>'
        f'<circle cx="{x(value):.1f}" cy="8" r="3.4"/></svg>'
    )
    return Markup(drawing)  # noqa: S704 - numbers alone


def _open(wide: float, high: float, title: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {wide} {high:.0f}" role="img" aria-label="{escape(title)}">'


# -- numbers -----------------------------------------------------------------------------------------------------------


def _finite(points: Sequence[Point], log: bool) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]


def thinned(points: Sequence[Point], kind: str = "line") -> list[Point]:
    """At most 300 points of a line: means over equal stretches of it. Other kinds stay as they are."""
    if kind != "line" or len(points) <= _POINTS:
        return list(points)
    size = len(points) / _POINTS
    parts = [points[int(i * size) : int((i + 1) * size)] for i in range(_POINTS)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def smoothed(points: Sequence[Point], span: int) -> list[Point]:
    """The mean of each point and those before it, `span` of them; no more than `span` points stay as they are."""
    if len(points) <= span:
        return list(points)
    return [
        (points[i][0], sum(y for _, y in points[max(0, i - span + 1) : i + 1]) / min(i + 1, span))
        for i in range(len(points))
    ]


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that span low to high, `about` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that span low to high, at most seven."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 6))
    return [10.0**i for i in range(first, last + every, every)]


def short(value: float) -> str:
    """A number in a few characters: 12,340 is 12.3k, 0.000012 is 1.2e-05."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.4g}"
