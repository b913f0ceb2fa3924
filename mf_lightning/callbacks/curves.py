"""The lines of sample_eval.jsonl, and which of their figures may share a curve: those of one protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import LightningModule

from mf_lightning.metrics.protocol import METRICS, protocol_id


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the lines of ``sample_eval.jsonl`` with the id of each protocol; a line cut off in the middle is left out."""
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{**row, "protocol_id": row.get("protocol_id") or protocol_id(row["protocol"])} for row in rows]


def first_protocol(file: Path) -> str | None:
    """Return the id of the protocol that a run's curves began with; None if it has no figures yet."""
    rows = read_rows(file)
    return rows[0]["protocol_id"] if rows else None


def weights_suffix(ema: float | None, *, first: float | None) -> str:
    """Return what follows the number of steps in a figure's key: nothing for the first EMA, ``/raw`` or ``/ema0.999``."""
    return "" if ema == first else "/raw" if ema is None else f"/ema{ema}"


def protocol_suffix(protocol: str, *, home: str | None) -> str:
    """Return what a figure's key ends with: nothing under the protocol that the curves began with, else ``@ID``.

    A run that goes on with other settings of evaluation (more images, another reference) thus begins curves of their own.
    """
    return "" if home in (None, protocol) else f"@{protocol}"


def log_figures(pl_module: LightningModule, row: dict[str, Any], *, first: float | None, home: str | None) -> None:
    """Log one evaluation's figures as ``fid/nfe1``, ...; what watches them finds them under that name in any case.

    Args:
        pl_module: that logs.
        row: line of ``sample_eval.jsonl``.
        first: average whose figures have keys without a suffix.
        home: protocol that the run's curves began with; None is this one.
    """
    mark = protocol_suffix(row["protocol_id"], home=home)
    for metric in METRICS:
        value = row.get(metric.name)
        if value is None:
            continue
        key = f"{metric.name}/nfe{row['nfe']}{weights_suffix(row['ema'], first=first)}"
        pl_module.log(key, value, logger=not mark, rank_zero_only=False)
        if mark:
            pl_module.log(key + mark, value, rank_zero_only=False)


def keep_lines(file: Path, *, before: int) -> None:
    """Drop lines of a step and later ones, and one that was cut off in the middle."""
    if not file.exists():
        return
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < before]
    if kept != lines:
        aside = file.with_name(f".{file.name}.tmp")
        aside.write_text("".join(kept))
        aside.replace(file)


def append_line(file: Path, row: dict[str, Any]) -> None:
    """Add one evaluation's line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
