"""A chart as a PNG file, for talks and messages: the light page's colours on white."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from mf_lightning.report.charts import HEIGHT, WIDTH, Chart, Line, Mark, draw
from mf_lightning.report.svg import DASHES

PALETTE = ("#0067a5", "#c8500a", "#57a27c", "#521842", "#39360c", "#6b24cb")
"""As in page.css, light."""
SIZE, SMOOTH = 2, 2
"""Pixels of the file per unit of the drawing; drawn this many times larger and reduced."""
MADE_BY = "mf_lightning report"
_GRID, _INK, _MUTED = "#dfe3e8", "#1c2329", "#55606b"


def save_png(chart: Chart, file: Path) -> None:
    """Write a chart with title and legend to a file."""
    scale = SIZE * SMOOTH
    head, line_height = 26, 17
    height = head + HEIGHT + line_height * len(chart.series) + 10
    image = Image.new("RGB", (WIDTH * scale, height * scale), "white")
    pen = _Pen(ImageDraw.Draw(image), scale, head)
    pen.text(4, -8, chart.title, "start", size=15, colour=_INK)
    drawing = draw(chart)
    for line in drawing.lines:
        pen.line(line)
    for mark in drawing.marks:
        pen.mark(mark)
    for text in drawing.texts:
        pen.text(text.x, text.y, text.text, text.anchor)
    for number, series in enumerate(chart.series):
        y = HEIGHT + 6 + number * line_height
        pen.line(Line(((6, y), (40, y)), series.colour, series.dash))
        pen.mark(Mark(23, y, series.marker, series.colour, ""))
        pen.text(48, y + 4, series.name, "start")
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", MADE_BY)
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    image.resize((WIDTH * SIZE, height * SIZE), Image.Resampling.LANCZOS).save(aside, "PNG", pnginfo=about)
    aside.replace(file)


def remove_old(folder: Path, keep: set[str]) -> None:
    """Remove plots of an earlier report that this one does not have; other files stay."""
    for file in folder.glob("*.png"):
        if file.name in keep:
            continue
        try:
            with Image.open(file) as image:
                ours = image.info.get("Software") == MADE_BY
        except UnidentifiedImageError:  # somebody's, or cut off
            continue
        if ours:
            file.unlink()


class _Pen:
    """Draws in the chart's units on a larger picture."""

    def __init__(self, on: ImageDraw.ImageDraw, scale: int, head: int) -> None:
        self.on, self.scale, self.head = on, scale, head

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return x * self.scale, (y + self.head) * self.scale

    def line(self, line: Line) -> None:
        colour = _GRID if line.colour is None else PALETTE[line.colour % len(PALETTE)]
        width = self.scale if line.colour is None else 2 * self.scale
        for piece in _dashed(line.points, DASHES[line.dash % len(DASHES)]):
            self.on.line([self._at(*point) for point in piece], fill=colour, width=width, joint="curve")

    def mark(self, mark: Mark) -> None:
        around = (
            [(4 * math.cos(k / 12 * math.pi), 4 * math.sin(k / 12 * math.pi)) for k in range(24)],
            [(-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)],
            [(0, -4.8), (4.6, 3.4), (-4.6, 3.4)],
            [(0, -5), (5, 0), (0, 5), (-5, 0)],
        )
        corners = around[mark.kind % len(around)]
        self.on.polygon([self._at(mark.x + x, mark.y + y) for x, y in corners], fill=PALETTE[mark.colour % len(PALETTE)])

    def text(self, x: float, y: float, text: str, anchor: str, size: int = 13, colour: str = _MUTED) -> None:
        font = ImageFont.load_default(size * self.scale)
        self.on.text(self._at(x, y), text, fill=colour, font=font, anchor={"start": "ls", "middle": "ms", "end": "rs"}[anchor])


def _dashed(points: tuple[tuple[float, float], ...], dash: str) -> list[list[tuple[float, float]]]:
    """Return the pieces of a polyline that a dash pattern (lengths on, off, ...) leaves."""
    if not dash:
        return [list(points)]
    lengths = [float(length) for length in dash.split()]
    pieces, piece, number, left = [], [points[0]], 0, lengths[0]
    for start, end in pairwise(points):
        distance = math.dist(start, end)
        gone = 0.0
        while distance - gone > left:
            gone += left
            share = gone / distance
            point = (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]))
            if number % 2 == 0:
                pieces.append([*piece, point])
            piece, number = [point], (number + 1) % len(lengths)
            left = lengths[number]
        left -= distance - gone
        piece.append(end)
    return [*pieces, piece] if number % 2 == 0 and len(piece) > 1 else pieces
