"""The lines of sample_eval.jsonl, and which of their figures may share a curve: those of one protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from mf_lightning.metrics.protocol import COMPARED, METRICS, protocol_id


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the lines of ``sample_eval.jsonl`` with the id of each protocol; a line cut off in the middle is left out."""
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{**row, "protocol_id": row.get("protocol_id") or protocol_id(row["protocol"])} for row in rows]


def of_training(row: dict[str, Any]) -> bool:
    """Tell whether a line was measured while training, not by `validate` or `test`."""
    return row.get("stage", "fit") == "fit"


class Home(NamedTuple):
    """What a run's curves began with: other figures get keys of their own."""

    protocol: str
    """Id."""
    ema: float | None
    """Average whose keys have no suffix."""


def find_home(file: Path) -> Home | None:
    """Return what a run's curves began with; None if it has no figures yet."""
    rows = [row for row in read_rows(file) if of_training(row)]
    return Home(rows[0]["protocol_id"], rows[0]["ema"]) if rows else None


def weights_suffix(ema: float | None, *, first: float | None) -> str:
    """Return what follows the number of steps in a figure's key: nothing for the first EMA, ``/raw`` or ``/ema0.999``."""
    return "" if ema == first else "/raw" if ema is None else f"/ema{ema}"


def protocol_suffix(protocol: str, *, home: str | None) -> str:
    """Return what a figure's key ends with: nothing under the protocol that the curves began with, else ``@ID``.

    A run that goes on with other settings of evaluation (more images, another reference) thus begins curves of their own.
    """
    return "" if home in (None, protocol) else f"@{protocol}"


def log_figures(pl_module: LightningModule, row: dict[str, Any], *, first: float | None, home: Home | None) -> None:
    """Log one evaluation's figures as ``fid/nfe1``, ...; what watches them finds them under that name in any case.

    Args:
        pl_module: that logs.
        row: line of ``sample_eval.jsonl``.
        first: average that is watched without a suffix.
        home: what the run's curves began with; None is this row's protocol and that average.
    """
    began = Home(row["protocol_id"], first) if home is None else home
    mark = protocol_suffix(row["protocol_id"], home=began.protocol)
    for metric in METRICS:
        value = row.get(metric.name)
        if value is None:
            continue
        name = f"{metric.name}/nfe{row['nfe']}"
        watched = name + weights_suffix(row["ema"], first=first)
        logged = name + weights_suffix(row["ema"], first=began.ema) + mark
        pl_module.log(watched, value, logger=watched == logged, rank_zero_only=False)
        if watched != logged:
            pl_module.log(logged, value, rank_zero_only=False)


def note_protocol(trainer: Trainer, row: dict[str, Any]) -> None:
    """Write a protocol into TensorBoard as text, under its id; W&B has it in the run's config."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            shared = {key: value for key, value in row["protocol"].items() if key not in COMPARED}
            text = "\n".join(f"- {key}: {value}" for key, value in shared.items())
            logger.experiment.add_text(f"protocol/{row['protocol_id']}", text, global_step=row["step"])


def keep_lines(file: Path, *, before: int) -> None:
    """Drop what a training measured at a step and later, and a line that was cut off in the middle."""
    if not file.exists():
        return
    lines = file.read_text().splitlines(keepends=True)
    whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [line for line, row in whole if row["step"] < before or not of_training(row)]
    if kept != lines:
        aside = file.with_name(f".{file.name}.tmp")
        aside.write_text("".join(kept))
        aside.replace(file)


def append_line(file: Path, row: dict[str, Any]) -> None:
    """Add one evaluation's line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
