"""`report`: figures, curves, samples, settings and cost of runs on one page, without an account anywhere."""

from __future__ import annotations

from mf_lightning.report import write_report


def report(runs: list[str], out: str | None = None, png: bool = True) -> None:
    """Write report.html, one page that needs nothing but itself, into the first run's folder, and its plots as PNG into plots/.

    Args:
        runs: folders of runs (their trainer.default_root_dir); the first is where the report is written.
        out: another folder to write into.
        png: false writes the page only.

    Raises:
        UserError: a folder that holds no run, or one that cannot be written to.
    """
    page, plots, notes = write_report(runs, out=out, png=png)
    for note in notes:
        print(f"note: {note}")
    if plots:
        print(f"{len(plots)} plots: {plots[0].parent}")
    print(f"report: {page}")
