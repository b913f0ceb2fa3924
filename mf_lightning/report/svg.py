"""A chart as SVG inside a page: colours come from the page's style, so it follows light and dark."""

from __future__ import annotations

from html import escape

from mf_lightning.report.charts import HEIGHT, WIDTH, Chart, Series, draw

DASHES = ("", "7 4", "2 3", "9 3 2 3")
COLOURS = 6
_SHAPES = (  # around (0, 0)
    '<circle r="4"/>',
    '<path d="M-3.6-3.6h7.2v7.2h-7.2z"/>',
    '<path d="M0-4.8L4.6 3.4H-4.6z"/>',
    '<path d="M0-5L5 0L0 5L-5 0z"/>',
)


def svg(chart: Chart) -> str:
    """Return a chart as an ``<svg>`` element that fills its box's width."""
    drawing = draw(chart)
    parts = []
    for line in drawing.lines:
        points = " ".join(f"{x:g},{y:g}" for x, y in line.points)
        style = "grid" if line.colour is None else f"line c{line.colour % COLOURS}"
        parts.append(f'<polyline class="{style}" points="{points}"{_dash(line.dash)}/>')
    for mark in drawing.marks:
        shape = _SHAPES[mark.kind % len(_SHAPES)]
        parts.append(
            f'<g class="mark c{mark.colour % COLOURS}" transform="translate({mark.x:g} {mark.y:g})">'
            f"<title>{escape(mark.title)}</title>{shape}</g>"
        )
    for text in drawing.texts:
        parts.append(f'<text x="{text.x:g}" y="{text.y:g}" text-anchor="{text.anchor}">{escape(text.text)}</text>')
    label = escape(f"{chart.title}: {chart.y} against {chart.x}. The values are in the table below.", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def legend(series: tuple[Series, ...]) -> str:
    """Return the names of a chart's lines, each behind a piece of it."""
    items = []
    for one in series:
        colour = f"c{one.colour % COLOURS}"
        shape = _SHAPES[one.marker % len(_SHAPES)]
        sample = (
            f'<svg class="key" viewBox="0 0 34 12" aria-hidden="true"><polyline class="line {colour}" points="1,6 33,6"'
            f'{_dash(one.dash)}/><g class="mark {colour}" transform="translate(17 6)">{shape}</g></svg>'
        )
        items.append(f"<li>{sample}{escape(one.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _dash(number: int) -> str:
    dash = DASHES[number % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""
