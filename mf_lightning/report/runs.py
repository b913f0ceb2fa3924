"""What a run's folder holds. It is read with patience: what is damaged is left out and named in a note."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mf_lightning.metrics.protocol import METRICS, protocol_id
from mf_lightning.types import UserError

FIGURES_FILE = "sample_eval.jsonl"
CURVES_FILE = "metrics.csv"
CONFIG_FILE = "config.yaml"
RECORD_FILE = "run.json"
GRID_NAME = re.compile(r"step(\d+)(?:_nfe(\d+))?\.png")


@dataclass(frozen=True)
class Row:
    """Figures of one evaluation at one EMA and NFE: a line of ``sample_eval.jsonl``."""

    step: int
    ema: float | None
    """None is the raw weights."""
    nfe: int
    figures: dict[str, float]
    """By name, with the spreads (``kid_std``); a figure that was not measured is absent."""
    protocol: dict[str, Any]
    protocol_id: str
    seconds: float | None
    """Measured seconds per image."""
    seconds_from_rate: bool
    """Whether ``seconds`` is 1 / images_per_s of an older run, which includes scoring."""


@dataclass(frozen=True)
class Grid:
    """A file of sample pictures."""

    step: int
    nfe: int | None
    """None: several NFE in one picture."""
    path: Path


@dataclass
class Run:
    """One run as far as its folder tells."""

    name: str
    path: Path
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Logged values by name: (optimizer steps done, value), by step."""
    config: dict[str, Any] | None = None
    grids: list[Grid] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    """``run.json``: versions, device, parameters, time; empty in older runs."""
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """Names of the figures that were measured, in the order in which they are shown."""
        return [metric.name for metric in METRICS if any(metric.name in row.figures for row in self.rows)]


def read_runs(folders: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Return the runs in the order given, each once, and notes about those given twice.

    Raises:
        UserError: no folder given, one that is none, or one without figures and curves.
    """
    if not folders:
        raise UserError("Got no run, expected at least one folder of a run, for example runs/quickstart. Name it.")
    paths: list[Path] = []
    notes = []
    for folder in map(Path, folders):
        if folder.resolve() in [path.resolve() for path in paths]:
            notes.append(f"{folder} was given more than once; it is shown once.")
        else:
            paths.append(folder)
    names = _short_names([path.resolve() for path in paths])
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)], notes


def read_run(folder: Path, name: str) -> Run:
    """Return what one folder holds.

    Raises:
        UserError: it is no folder, or it holds neither figures nor curves.
    """
    if not folder.is_dir():
        beside = f" It is a file: give its folder, {folder.parent}." if folder.is_file() else ""
        raise UserError(
            f"Got {folder}, which is no folder, expected a run's folder (its trainer.default_root_dir).{beside or ' Check it.'}"
        )
    if not (folder / FIGURES_FILE).is_file() and not (folder / CURVES_FILE).is_file():
        below = sorted(str(file.parent) for pattern in (FIGURES_FILE, CURVES_FILE) for file in folder.glob(f"*/{pattern}"))
        hint = f"Runs below it: {', '.join(dict.fromkeys(below))}." if below else "Give a run's trainer.default_root_dir."
        raise UserError(f"Got {folder} without {FIGURES_FILE} and {CURVES_FILE}, expected the folder of a run. {hint}")
    run = Run(name, folder)
    run.rows = _read_rows(folder / FIGURES_FILE, run.notes)
    run.curves = _read_curves(folder / CURVES_FILE, run.notes)
    run.config = _read_mapping(folder / CONFIG_FILE, yaml.safe_load, yaml.YAMLError, run.notes)
    run.record = _checked(_read_mapping(folder / RECORD_FILE, json.loads, ValueError, run.notes) or {}, run.notes)
    run.grids = _read_grids(folder / "grids")
    if not run.rows and not run.curves:
        raise UserError(
            f"Got {folder} without one readable figure or logged value ({' '.join(run.notes) or 'its files are empty'}), "
            "expected a run that got as far as its first log. Leave it out."
        )
    if not run.rows:
        run.notes.append("No figures of generated images were measured (sample_eval.num_samples=0, or no validation yet).")
    return run


def _short_names(paths: list[Path]) -> list[str]:
    """Return each folder's own name, with as many parents in front as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read_rows(file: Path, notes: list[str]) -> list[Row]:
    """Return the rows by step, EMA and NFE; of figures measured again under the same protocol the newest."""
    if not file.is_file():
        return []
    rows: dict[tuple, Row] = {}
    again = 0
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = _row(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            notes.append(f"{file.name}, line {number}, is damaged and left out ({type(error).__name__}: {error}).")
            continue
        key = (row.step, row.ema, row.nfe, row.protocol_id)
        again += key in rows
        rows[key] = row
    if again:
        notes.append(f"{file.name}: {again} lines measure again what an earlier line had; the newest is shown.")
    return sorted(rows.values(), key=lambda row: (row.step, row.ema is None, row.ema or 0.0, row.nfe))


def _row(raw: dict[str, Any]) -> Row:
    protocol = raw.get("protocol") or {}
    figures = {}
    for metric in METRICS:
        for name in (metric.name, f"{metric.name}_std"):
            if raw.get(name) is not None:
                figures[name] = _number(raw[name], name)
    rate, seconds = raw.get("images_per_s"), raw.get("seconds_per_image")
    from_rate = seconds is None and bool(rate)
    if from_rate:
        seconds = 1.0 / _number(rate, "images_per_s")
    if not isinstance(raw["step"], int) or not isinstance(raw["nfe"], int):
        raise TypeError("step and nfe are whole numbers")
    return Row(
        step=raw["step"],
        ema=None if raw.get("ema") is None else _number(raw["ema"], "ema"),
        nfe=raw["nfe"],
        figures=figures,
        protocol={key: value for key, value in protocol.items() if key not in ("ema", "nfe")},
        protocol_id=str(raw.get("protocol_id") or protocol_id(protocol)),
        seconds=None if seconds is None else _number(seconds, "seconds_per_image"),
        seconds_from_rate=from_rate,
    )


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is no number: {value!r}")
    return float(value)


def _read_curves(file: Path, notes: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Return logged values by name. Steps are counted as ``sample_eval.jsonl`` does: 1 is behind the first step."""
    if not file.is_file():
        return {}
    curves: dict[str, list[tuple[int, float]]] = {}
    damaged: list[int] = []
    with file.open(newline="", errors="replace") as stream:
        reader = csv.reader(line.replace("\0", "\ufffd") for line in stream)
        header = next(reader, [])
        if "step" not in header:
            notes.append(f"{file.name} has no column `step` and is left out.")
            return {}
        for cells in reader:
            values = _values(header, cells)
            if values is None:
                damaged.append(reader.line_num)
                continue
            step = int(values.pop("step")) + 1
            for name, value in values.items():
                curves.setdefault(name, []).append((step, value))
    if damaged:
        lines = "line" if len(damaged) == 1 else "lines"
        notes.append(f"{file.name}: {len(damaged)} damaged {lines} left out, the first is line {damaged[0]}.")
    return {name: sorted(points, key=lambda point: point[0]) for name, points in sorted(curves.items())}


def _values(header: list[str], cells: list[str]) -> dict[str, float] | None:
    """Return a line's numbers by column, None for a damaged line."""
    if len(cells) != len(header):
        return None
    try:
        values = {name: float(cell) for name, cell in zip(header, cells, strict=True) if cell != ""}
    except ValueError:
        return None
    return values if math.isfinite(values.get("step", math.nan)) else None


def _read_mapping(file: Path, parse: Any, wrong: type[Exception], notes: list[str]) -> dict[str, Any] | None:
    if not file.is_file():
        if file.name != RECORD_FILE:  # older versions wrote none
            notes.append(f"There is no {file.name}.")
        return None
    try:
        content = parse(file.read_text(errors="replace"))
    except wrong as error:
        notes.append(f"{file.name} is damaged and left out ({str(error).splitlines()[0]}).")
        return None
    if isinstance(content, dict):
        return content
    notes.append(f"{file.name} holds no settings and is left out.")
    return None


def _checked(record: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the record with those sessions only whose times and steps are numbers."""
    sessions = record.get("sessions")
    good = [session for session in sessions if _is_session(session)] if isinstance(sessions, list) else []
    if record and (not isinstance(sessions, list) or len(good) < len(sessions)):
        notes.append(f"{RECORD_FILE} is damaged: what cannot be read of it is left out.")
    return {**record, "sessions": good} if record else {}


def _is_session(session: Any) -> bool:
    if not isinstance(session, dict) or not isinstance(session.get("versions", {}), dict):
        return False
    return all(isinstance(session.get(name), int | float) for name in ("seconds", "from_step", "to_step"))


def _read_grids(folder: Path) -> list[Grid]:
    found = []
    for file in folder.glob("step*.png") if folder.is_dir() else ():
        match = GRID_NAME.fullmatch(file.name)
        if match:
            found.append(Grid(int(match[1]), int(match[2]) if match[2] else None, file))
    return sorted(found, key=lambda grid: (grid.step, grid.nfe or 0))
