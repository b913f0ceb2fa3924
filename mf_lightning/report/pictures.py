"""Sample grids as data inside a page: as they are if small, else smaller and as JPEG; within a limit for the whole page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image, UnidentifiedImageError

from mf_lightning.report.runs import Grid, Run

MOST_STEPS = 12
LIMIT = 6_000_000
"""Bytes of all embedded files together; the newest grids of each run are always there."""
WIDEST = 1280
"""Wider grids are embedded this many pixels wide."""
LARGEST = 400_000
"""Bytes from which on a grid is embedded as JPEG."""


def samples(runs: Sequence[Run]) -> str:
    """Return the grids of each run, newest first shown, earlier steps behind a slider; "" if no run has any."""
    there = [run for run in runs if run.grids]
    return "".join(_one_run(run, LIMIT // len(there), name=len(runs) > 1, number=number) for number, run in enumerate(there))


def _one_run(run: Run, limit: int, *, name: bool, number: int) -> str:
    by_step: dict[int, list[Grid]] = {}
    for grid in run.grids:
        by_step.setdefault(grid.step, []).append(grid)
    chosen = spread(sorted(by_step), MOST_STEPS)
    sets: dict[int, str] = {}
    used = 0
    for step in reversed(chosen):
        figures = [_figure(grid, run) for grid in by_step[step]]
        size = sum(map(len, figures))
        if sets and used + size > limit:
            break
        sets[step] = "".join(figures)
        used += size
    shown = sorted(sets)
    boxes = [
        f'<div class="pictures" data-step="{step}"{"" if step == shown[-1] else " hidden"}>{sets[step]}</div>' for step in shown
    ]
    last = len(shown) - 1
    slider = (
        f'<div class="slider" hidden><label for="slider-{number}">Step</label><input id="slider-{number}" type="range" min="0" '
        f'max="{last}" value="{last}" step="1"><output>step {shown[-1]:,}</output></div>'
    )
    left = len(by_step) - len(shown)
    where = escape(str(run.path / "grids"))
    note = f'<p class="muted">{len(shown)} of {len(by_step)} steps are on this page; all are in {where}.</p>'
    head = f"<h3>{escape(run.name)}</h3>" if name else ""
    return f'<div class="card samples">{head}{slider if last else ""}{"".join(boxes)}{note if left else ""}</div>'


def spread(steps: list[int], most: int) -> list[int]:
    """Return at most ``most`` of the steps, evenly spread, with the first and the last."""
    if len(steps) <= most:
        return steps
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]


def _figure(grid: Grid, run: Run) -> str:
    kind = "NFE by row, then real images" if grid.nfe is None else f"{grid.nfe} NFE"
    label = f"{kind}, step {grid.step:,}"
    try:
        uri, width, height, reduced = embedded(grid)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        run.notes.append(f"grids/{grid.path.name} cannot be read and is left out ({type(error).__name__}).")
        return ""
    small = ' class="small"' if width < 600 else ""
    factor = 2 if width < 320 else 1
    note = f" (reduced; {escape(grid.path.name)} is the whole)" if reduced else ""
    alt = escape(f"Generated samples of {run.name}, {label}", quote=True)
    style = ' class="all"' if grid.nfe is None else ""
    return (
        f'<figure{style}><img{small} src="{uri}" width="{width * factor}" height="{height * factor}" alt="{alt}">'
        f"<figcaption>{escape(label)}{note}</figcaption></figure>"
    )


def embedded(grid: Grid) -> tuple[str, int, int, bool]:
    """Return a grid as a data URI, its width and height in pixels, and whether it was reduced."""
    content = grid.path.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        if len(content) <= LARGEST and picture.width <= WIDEST:
            return f"data:image/png;base64,{base64.b64encode(content).decode()}", picture.width, picture.height, False
        picture = picture.convert("RGB")
        picture.thumbnail((WIDEST, 4 * WIDEST), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=88)
        return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", picture.width, picture.height, True
