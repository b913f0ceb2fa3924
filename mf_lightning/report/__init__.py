"""One self-contained page about one or more runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mf_lightning.report.page import page, sections_of_charts
from mf_lightning.report.png import remove_old, save_png
from mf_lightning.report.runs import FIGURES_FILE, RECORD_FILE, read_runs
from mf_lightning.types import UserError

PAGE_FILE = "report.html"
PLOTS_FOLDER = "plots"

__all__ = ["FIGURES_FILE", "PAGE_FILE", "PLOTS_FOLDER", "RECORD_FILE", "write_report"]


def write_report(
    folders: Sequence[str | Path], *, out: str | Path | None = None, png: bool = True
) -> tuple[Path, list[Path], list[str]]:
    """Write ``report.html``, and a PNG of each plot into ``plots/``, about runs.

    Args:
        folders: of the runs.
        out: where to write; None is the first run's folder.
        png: whether to write PNGs too.

    Returns:
        The page, the PNGs, and notes about what was left out.

    Raises:
        UserError: a folder without a run in it, or a place that cannot be written to.
    """
    runs, notes = read_runs(folders)
    target = runs[0].path if out is None else Path(out)
    charts = sections_of_charts(runs)
    html = page(runs, charts, notes)
    files = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        aside = target / f".{PAGE_FILE}.{os.getpid()}.tmp"
        aside.write_text(html, encoding="utf-8")
        aside.replace(target / PAGE_FILE)
        if png:
            plots = [chart for section in charts.values() for chart in section]
            (target / PLOTS_FOLDER).mkdir(exist_ok=True)
            for chart in plots:
                files.append(target / PLOTS_FOLDER / f"{chart.key}.png")
                save_png(chart, files[-1])
            remove_old(target / PLOTS_FOLDER, {file.name for file in files})
    except OSError as error:
        raise UserError(
            f"Got {target}, where nothing can be written ({error.strerror or error}), expected a folder for the "
            "report. Give another with --out."
        ) from error
    return target / PAGE_FILE, files, [*notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]
