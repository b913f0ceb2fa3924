"""How many images a second the training takes."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log ``train/images_per_s``: images of all devices per second of training since the last line of the log.

    Validations, evaluations and their checkpoints are left out. The host never waits for the device: it is at most a step ahead
    of it, which a window of many steps evens out. The first window starts behind the first step, which compiles.
    """

    def __init__(self) -> None:
        self._since: tuple[int, float] | None = None
        self._paused_at: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._since = self._paused_at = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let it go on, when the checkpoint behind a validation is written."""
        if self._since is not None and self._paused_at is not None:
            step, start = self._since
            self._since = step, start + time.perf_counter() - self._paused_at
        self._paused_at = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where the step is logged."""
        now, step = time.perf_counter(), trainer.global_step
        if self._since is None:
            self._since = step, now
        elif step > self._since[0] and trainer._logger_connector.should_update_logs:
            rate = (step - self._since[0]) * trainer.datamodule.batch_size / max(now - self._since[1], 1e-9)
            pl_module.log("train/images_per_s", rate, batch_size=1)
            self._since = step, now
