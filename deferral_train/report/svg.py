"""Small charts as inline SVG: lines with intervals and markers, and bars. Colours come from the page's style
sheet.

Everything that enters from outside (names, labels) is escaped here; the result is marked safe for the
template.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from deferral_train.report.numbers import nice

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 104, 16, 14, 62
LETTER, ROW = (
    8,
    23,
)  # about the width of one in a name; what keeps rows of names apart, also in a narrow window


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: shown in the legend.
        x, y: points in drawing order. low, high: interval of y at each point, or None.
        colour: number of the style sheet's colour, 0 to 11.
        kind: ``"line"``, ``"points"`` (no line) or ``"dashed"``.
        notes: text shown on hover of each point, or None.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    colour: int = 0
    kind: str = "line"
    notes: Sequence[str] | None = None


@dataclass(frozen=True)
class Axis:
    """One axis: its label and range; ``ticks`` where the numbers are written."""

    label: str
    low: float
    high: float

    @classmethod
    def around(cls, label: str, values: Sequence[float], zero: bool = False) -> Axis:
        """A range that holds all finite values with a small margin."""
        finite = [value for value in values if value is not None and math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        return cls(label, low if zero and low == 0 else low - margin, high + margin)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round numbers inside the range."""
        raw = (self.high - self.low) / wanted
        power = 10 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    zero: bool = False,
    diagonal: bool = False,
    labels: bool = False,
) -> Markup:
    """A chart of several series; empty Markup where no series has a point.

    Args:
        title: what a screen reader announces.
        zero: keep zero in the range of y. diagonal: draw x = y, with one range for both axes.
        labels: write each series' name beside its first point.
    """
    series = [line for line in series if len(line.x)]
    if not series:
        return Markup("")
    xs = [value for line in series for value in line.x]
    ys = [value for line in series for part in (line.y, line.low or (), line.high or ()) for value in part]
    ys = [value for value in ys if value is not None]
    x_axis = Axis.around(x_label, [*xs, *(ys if diagonal else ())])
    y_axis = Axis.around(y_label, [*ys, *(xs if diagonal else ())], zero)
    parts = [_frame(x_axis, y_axis)]
    if diagonal:
        parts.append(_path([(_x(x_axis, v), _y(y_axis, v)) for v in (x_axis.low, x_axis.high)], "diagonal"))
    parts += [_series(line, x_axis, y_axis) for line in series]
    if labels:
        parts.append(_labels(series, x_axis, y_axis))
    return _svg(title, parts)


def bar_chart(
    title: str, labels: Sequence[str], values: Sequence[float], y_label: str, colour: int = 0
) -> Markup:
    """Bars side by side from zero."""
    if not values:
        return Markup("")
    axis = Axis.around(y_label, list(values), zero=True)
    slot = (WIDTH - LEFT - RIGHT) / len(values)
    bars = []
    for number, (label, value) in enumerate(zip(labels, values)):
        x, top, base = LEFT + slot * (number + 0.15), _y(axis, max(value, 0)), _y(axis, min(value, 0))
        note = escape(f"{label}: {nice(value)}")
        bars.append(
            f'<rect class="c{colour}" x="{x:.1f}" y="{top:.1f}" width="{slot * 0.7:.1f}" '
            f'height="{max(base - top, 0.5):.1f}"><title>{note}</title></rect>'
            f'<text x="{x + slot * 0.35:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">'
            f"{escape(label)}</text>"
        )
    return _svg(title, [_frame(Axis("", 0, 1), axis, x_numbers=False), *bars])


def _svg(title: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _frame(x_axis: Axis, y_axis: Axis, x_numbers: bool = True) -> str:
    parts = []
    for tick in y_axis.ticks():
        y = _y(y_axis, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in x_axis.ticks() if x_numbers else ():
        x = _x(x_axis, tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{_tick(tick)}</text>'
        )
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label" x="{middle_x}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"{escape(x_axis.label)}</text>"
    )
    parts.append(
        f'<text class="label" transform="translate(20 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_axis.label)}</text>"
    )
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _series(line: Series, x_axis: Axis, y_axis: Axis) -> str:
    places = [(_x(x_axis, x), _y(y_axis, y)) for x, y in zip(line.x, line.y)]
    parts = [f'<g class="series c{line.colour} {line.kind}" data-series="{escape(line.name)}">']
    if line.low is not None and line.high is not None:
        parts.append(_band(line, x_axis, y_axis))
    if line.kind != "points":
        parts.append(_path(places, "line"))
    if len(places) <= 60:
        parts += [_dot(x, y, _note(line, number)) for number, (x, y) in enumerate(places)]
    return "".join([*parts, "</g>"])


def _labels(series: Sequence[Series], x_axis: Axis, y_axis: Axis) -> str:
    """Names beside first points, towards the middle of the chart; moved up or down off points and other names."""
    dots = [(_x(x_axis, x), _y(y_axis, y)) for line in series for x, y in zip(line.x, line.y)]
    parts: list[str] = []
    names: list[tuple[float, float, float]] = []  # left and right end, row

    def free(left: float, right: float, row: float) -> bool:
        clear = all(not (left < x < right and row - 16 < y < row + 6) for x, y in dots)
        return clear and all(right < start or end < left or abs(row - at) >= ROW for start, end, at in names)

    for y, x, name in sorted((_y(y_axis, line.y[0]), _x(x_axis, line.x[0]), line.name) for line in series):
        side = "end" if x > (LEFT + WIDTH) / 2 else "start"
        at = x + (-9 if side == "end" else 9)
        left = at - LETTER * len(name) if side == "end" else at
        right = left + LETTER * len(name)
        rows = [y + 5 + ROW * step for step in sorted(range(-9, 10), key=abs)]
        inside = [row for row in rows if TOP + 12 <= row <= HEIGHT - BOTTOM - 3]
        row = next((row for row in inside if free(left, right, row)), y + 5)
        names.append((left, right, row))
        parts.append(f'<text x="{at:.1f}" y="{row:.1f}" text-anchor="{side}">{escape(name)}</text>')
    return "".join(parts)


def _band(line: Series, x_axis: Axis, y_axis: Axis) -> str:
    """Interval as a filled band along a line, as whiskers at loose points."""
    assert line.low is not None
    assert line.high is not None
    known = [
        (x, lo, hi) for x, lo, hi in zip(line.x, line.low, line.high) if lo is not None and hi is not None
    ]
    if line.kind == "points":
        whiskers = (f"M{_x(x_axis, x):.1f} {_y(y_axis, lo):.1f}V{_y(y_axis, hi):.1f}" for x, lo, hi in known)
        return f'<path class="whisker" d="{"".join(whiskers)}"/>'
    upper = [f"{_x(x_axis, x):.1f},{_y(y_axis, hi):.1f}" for x, _, hi in known]
    lower = [f"{_x(x_axis, x):.1f},{_y(y_axis, lo):.1f}" for x, lo, _ in reversed(known)]
    return f'<polygon class="band" points="{" ".join([*upper, *lower])}"/>'


def _path(places: Sequence[tuple[float, float]], css: str) -> str:
    return f'<path class="{css}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>'


def _dot(x: float, y: float, note: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(note)}</title></circle>'


def _note(line: Series, number: int) -> str:
    if line.notes is not None:
        return f"{line.name}: {line.notes[number]}"
    return f"{line.name}: {nice(line.x[number])}, {nice(line.y[number])}"
