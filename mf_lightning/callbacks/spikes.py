"""spikes.jsonl: the steps whose gradient or error jumped, and the rows that made them jump."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mf_lightning.callbacks.guards import HostCopy, NonFiniteError
from mf_lightning.types import LatentBatch, UserError

SPIKES_FILE = "spikes.jsonl"
LEAST_STEPS = 20
"""Steps behind a median, at least."""


@dataclass
class _Rows:
    """What is known of the rows of one batch; only ``raw_error`` is on the device."""

    index: Tensor
    row: Tensor
    t: Tensor
    r: Tensor
    raw_error: Tensor


@dataclass
class _Step:
    """One optimizer step, on its way to the host."""

    step: int
    numbers: HostCopy
    """Gradient norm and mean raw error, over all processes."""
    batches: list[_Rows]
    """This process's, accumulated batches one by one."""


class SpikeLog(Callback):
    """Write a line to ``spikes.jsonl`` for each step whose gradient norm or mean raw error jumps, with its worst rows.

    A step jumps where one of the two exceeds ``factor`` times its median over the finite steps before it, or is not finite
    (a null in the file). Each step is judged one step later, so that the host does not wait for the device.

    Args:
        factor: how many times the median is a jump, above 1; 0 turns the log off.
        window: steps of the median, at least 20; nothing is judged against fewer than 20.
        rows: rows of the global batch in a line, largest raw error first.
    """

    def __init__(self, factor: float = 10.0, window: int = 100, rows: int = 8) -> None:
        if factor != 0 and not 1 < factor < math.inf:
            raise UserError(f"Got spike_log.factor = {factor:g}, expected a number above 1, or 0, which turns the log off.")
        if window < LEAST_STEPS:
            raise UserError(f"Got spike_log.window = {window}, expected at least {LEAST_STEPS} steps.")
        if rows < 1:
            raise UserError(f"Got spike_log.rows = {rows}, expected at least 1. To turn the log off: spike_log.factor=0.")
        self.factor = factor
        self.window = window
        self.rows = rows
        self._on = False
        self._past: deque[list[float]] = deque(maxlen=window)
        self._batch: LatentBatch | None = None
        self._batches: list[_Rows] = []
        self._pending: _Step | None = None
        self._trainer: Trainer | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the window, with the newest step in it."""
        if self._trainer is not None:
            self._settle(self._trainer)
        return {"window": list(self._past)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the window back."""
        self._past = deque(state_dict["window"], maxlen=self.window)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier fit left half done; drop lines of steps that this run takes again."""
        self._on = self.factor > 0 and not trainer.fast_dev_run
        self._batch, self._batches, self._pending, self._trainer = None, [], None, trainer
        if self._on and trainer.is_global_zero:
            _drop_lines(_file(trainer), first_step=trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: LatentBatch, batch_idx: int) -> None:
        """Keep which samples and rows these are."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the rows of each batch of the step."""
        if self._on:
            batch, draw = self._batch, pl_module.last_draw
            self._batches.append(_Rows(batch.index, batch.row, draw.t, draw.r, pl_module.last_terms.raw_error))
        self._batch = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step before this one and send this one's numbers on their way."""
        if not self._on:
            return
        self._settle(trainer)
        raw_error = torch.cat([rows.raw_error for rows in self._batches]).mean()
        values = torch.stack([pl_module.gradient_norm().to(raw_error), raw_error])
        if trainer.world_size > 1:  # the norm too: equal to the last bit, so that all processes judge alike
            torch.distributed.all_reduce(values)
            values /= trainer.world_size
        self._pending, self._batches = _Step(trainer.global_step, HostCopy(values), self._batches), []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last step of the run."""
        self._settle(trainer)
        self._trainer = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the step at which the guard stopped: every process comes here with that error."""
        pending, self._trainer = self._pending, None
        if isinstance(exception, NonFiniteError) and pending is not None and pending.step == exception.step:
            self._settle(trainer)
        self._pending = None

    def _settle(self, trainer: Trainer) -> None:
        """Judge the pending step; it enters the window, if it is finite, after it was held against it."""
        step, self._pending = self._pending, None
        if step is None:
            return
        now = step.numbers.read()
        finite = all(map(math.isfinite, now))
        usual = [median(past) for past in zip(*self._past, strict=True)] if len(self._past) >= LEAST_STEPS else [None, None]
        jumped = any(old is not None and new > self.factor * old for new, old in zip(now, usual, strict=True))
        if jumped or not finite:
            rows = self._worst_rows(trainer, step)
            if trainer.is_global_zero:
                _append(_file(trainer), step.step, now, usual, rows)
        if finite:
            self._past.append(now)

    def _worst_rows(self, trainer: Trainer, step: _Step) -> list[dict[str, Any]]:
        """Return the worst rows of the global batch, worst first; all processes take part."""
        own = []
        for batch in step.batches:
            columns = (batch.index, batch.row, batch.t, batch.r, batch.raw_error)
            for values in zip(*(column.tolist() for column in columns), strict=True):
                row = dict(zip(("index", "row", "t", "r", "raw_error"), values, strict=True))
                own.append({**row, "process": trainer.global_rank})
        own = sorted(own, key=_goodness)[: self.rows]
        everyone = [own]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, own)
        return sorted((row for rows in everyone for row in rows), key=_goodness)[: self.rows]


def _goodness(row: dict[str, Any]) -> tuple[float, int]:
    """Return what sorts rows worst first: those that are not finite, then by raw error; equal ones by row."""
    error = row["raw_error"]
    return (-error if math.isfinite(error) else -math.inf, row["row"])


def _file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / SPIKES_FILE


def _append(file: Path, step: int, now: list[float], usual: list[float | None], rows: list[dict[str, Any]]) -> None:
    line = {
        "step": step,
        "grad_norm": _plain(now[0]),
        "grad_norm_median": usual[0],
        "raw_error": _plain(now[1]),
        "raw_error_median": usual[1],
        "rows": [{**row, "raw_error": _plain(row["raw_error"])} for row in rows],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(line, allow_nan=False) + "\n")


def _plain(value: float) -> float | None:
    """Return a number that JSON has: none is not finite there."""
    return value if math.isfinite(value) else None


def _drop_lines(file: Path, *, first_step: int) -> None:
    """Drop the lines of steps from ``first_step`` on, and one that a crash cut off."""
    if not file.exists():
        return
    whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text("".join(line for line in whole if json.loads(line)["step"] < first_step))
    aside.replace(file)
