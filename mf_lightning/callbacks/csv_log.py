"""metrics.csv that survives: Lightning's CSVLogger deletes the file of an earlier run in the same folder."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class _KeepingWriter(ExperimentWriter):
    """Goes on behind the rows that are there; rows from the first new step on are those of a run that was cut off."""

    def __init__(self, log_dir: str, file_name: str) -> None:
        self.NAME_METRICS_FILE = file_name
        super().__init__(log_dir=log_dir)
        self.first_step: int | None = None
        """Rows of earlier runs stay up to here; None is the first step that is written."""
        self._joined = False

    def _check_log_dir_exists(self) -> None:
        """Delete nothing (the base class deletes the metrics file here)."""

    def save(self) -> None:
        if self.metrics and not self._joined:
            first = min(int(row["step"]) for row in self.metrics) if self.first_step is None else self.first_step
            self._join(Path(self.metrics_file_path), first_step=first)
            self._joined = True
        super().save()

    def _join(self, file: Path, *, first_step: int) -> None:
        """Drop old rows from ``first_step`` on, and one that was cut off in the middle, and take over the old header."""
        if file.exists():
            rows, self.metrics_keys = _read_whole_rows(file)
            _write_rows(file, [row for row in rows if int(row["step"]) < first_step], self.metrics_keys)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns, in a new file that then takes the old one's place."""
        file = Path(self.metrics_file_path)
        _write_rows(file, _read_whole_rows(file)[0], fieldnames)


def _read_whole_rows(file: Path) -> tuple[list[dict[str, str]], list[str]]:
    with file.open(newline="") as stream:
        lines = [line for line in stream if line.endswith("\n")]
    reader = csv.DictReader(lines)
    return [row for row in reader if row.get("step")], sorted(reader.fieldnames or [])


def _write_rows(file: Path, rows: list[dict[str, str]], fieldnames: list[str]) -> None:
    aside = file.with_name(f".{file.name}.tmp")
    with aside.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(file)


class MetricsCSV(CSVLogger):
    """Write every logged value to one CSV file, kept over resumes.

    Args:
        folder: where the file is written.
        file_name: of the file; `validate` and `test` use ``metrics_validate.csv`` and ``metrics_test.csv``, so that they
            leave the training curves alone.
        flush_logs_every_n_steps: rows held back between writes.
    """

    def __init__(self, folder: str, file_name: str = "metrics.csv", flush_logs_every_n_steps: int = 10) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)
        self.file_name = file_name

    def start_from(self, step: int) -> None:
        """Drop rows of an earlier run from this optimizer step on: this run writes them again."""
        if rank_zero_only.rank == 0:
            self.experiment.first_step = step

    @property
    def experiment(self) -> ExperimentWriter:
        """Return the writer, made on first use on the first process."""
        if rank_zero_only.rank != 0:
            return super().experiment
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _KeepingWriter(self.log_dir, self.file_name)
        return self._experiment
