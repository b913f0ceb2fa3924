"""A chart as plain records, and where its parts lie: drawn once, put on the page as SVG and into files as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

WIDTH, HEIGHT = 400, 280
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 32, 46
LOG_FROM = 20.0
"""Positive values are drawn on a logarithmic axis if the largest is this many times the smallest."""


@dataclass(frozen=True)
class Series:
    """One line, or some points, of a chart."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(x, y) by x; a y that is not finite is a gap."""
    colour: int
    dash: int = 0
    marker: int = 0
    labels: tuple[str, ...] = ()
    """Written beside the points."""


@dataclass(frozen=True)
class Chart:
    """What is drawn on one pair of axes."""

    key: str
    """Name of the PNG."""
    title: str
    x: str
    y: str
    """Labels of the axes, with unit and direction."""
    series: tuple[Series, ...]
    x_scale: Literal["linear", "log", "nfe"] = "linear"
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A polyline."""

    points: tuple[tuple[float, float], ...]
    colour: int | None
    """Number of a series' colour; None is the grid."""
    dash: int = 0


@dataclass(frozen=True)
class Mark:
    """A point; its ``title`` is shown by the pointer."""

    x: float
    y: float
    kind: int
    colour: int
    title: str


@dataclass(frozen=True)
class Text:
    """A label at (x, y), the base line."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "middle"


@dataclass
class Drawing:
    """The parts of a drawn chart, in the order of painting; the origin is the upper left corner."""

    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """From values to places on the drawing."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def draw(chart: Chart) -> Drawing:
    """Return where the parts of a chart lie."""
    finite = [point for series in chart.series for point in series.points if _finite(*point)]
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_log, y_log = chart.x_scale == "nfe" and min(xs) > 0, is_log(ys)
    x_log = x_log or (chart.x_scale == "log" and is_log(xs, 8.0))
    x_scale = _scale(xs, log=x_log, start=LEFT, end=WIDTH - RIGHT, margin=0.04)
    y_scale = _scale(ys, log=y_log, start=HEIGHT - BOTTOM, end=TOP, margin=0.08)
    drawing = Drawing()
    x_ticks = sorted(set(xs)) if chart.x_scale == "nfe" else ticks(x_scale, 5)
    for tick in x_ticks:
        place = x_scale(tick)
        drawing.lines.append(Line(((place, TOP), (place, HEIGHT - BOTTOM)), None))
        drawing.texts.append(Text(place, HEIGHT - BOTTOM + 18, short(tick)))
    for tick in ticks(y_scale, 5):
        place = y_scale(tick)
        drawing.lines.append(Line(((LEFT, place), (WIDTH - RIGHT, place)), None))
        drawing.texts.append(Text(LEFT - 6, place + 5, short(tick), "end"))
    drawing.texts.append(Text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.x + (", log scale" if x_log else "")))
    drawing.texts.append(Text(4, 16, chart.y + (", log scale" if y_log else ""), "start"))
    for series in chart.series:
        _draw_series(drawing, series, x_scale, y_scale, chart)
    return drawing


def _draw_series(drawing: Drawing, series: Series, x_scale: Scale, y_scale: Scale, chart: Chart) -> None:
    few = len(series.points) <= 40
    piece: list[tuple[float, float]] = []
    for number, (x, y) in enumerate((*series.points, (math.nan, math.nan))):
        if _finite(x, y):
            place = (round(x_scale(x), 1), round(y_scale(y), 1))
            piece.append(place)
            if few:
                title = f"{series.name}: {exact(y)} at {chart.x} {exact(x)}"
                drawing.marks.append(Mark(*place, series.marker, series.colour, title))
            if series.labels and series.labels[number]:
                right = place[0] > WIDTH * 0.7
                shift = -8 if right else 8
                drawing.texts.append(Text(place[0] + shift, place[1] - 8, series.labels[number], "end" if right else "start"))
            continue
        if len(piece) > 1:
            drawing.lines.append(Line(tuple(piece), series.colour, series.dash))
        elif piece and not few:
            drawing.marks.append(Mark(*piece[0], series.marker, series.colour, series.name))
        piece = []


def is_log(values: Sequence[float], least: float = LOG_FROM) -> bool:
    """Return whether values are drawn on a logarithmic axis: all positive, the largest ``least`` times the smallest."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > least


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _scale(values: list[float], *, log: bool, start: float, end: float, margin: float) -> Scale:
    low, high = min(values), max(values)
    if log:
        if high < low * 1.05:
            low, high = low / 1.5, high * 1.5
        spread = (high / low) ** margin
        return Scale(low / spread, high * spread, True, start, end)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        half = abs(high) / 4 or 0.5
        low, high = low - half, high + half
    spread = (high - low) * margin
    return Scale(low - spread, high + spread, False, start, end)


def ticks(scale: Scale, count: int) -> list[float]:
    """Return about ``count`` round values inside a scale."""
    if scale.log and scale.high / scale.low > 8:
        decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            found = [value for value in found if scale.low <= value <= scale.high]
            if len(found) <= count + 2:
                return found
        return found[:: -(-len(found) // (count + 1))]
    rough = (scale.high - scale.low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


def short(value: float) -> str:
    """Return a tick's text: 1500 as 1.5k, 0.00002 as 2e-05."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}"


def exact(value: float | int) -> str:
    """Return a figure as tables show it: four digits, whole numbers whole."""
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.3e}"
