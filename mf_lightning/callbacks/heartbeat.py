"""One small file per process that says what it does, so that a run that hangs tells which process the others wait for."""

from __future__ import annotations

import datetime
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from mf_lightning.types import UserError


class Heartbeat(Callback):
    """Write ``heartbeat/rank00003.json`` below the run's folder from a thread of its own, while the main thread may hang.

    Hooks only set a variable and count: a process that hangs in another callback, which comes before this one, has passed fewer
    than those that wait for it. While it is on, ``kill -USR2 PID`` prints the stacks of a process to its stderr.
    ``python -m mf_lightning heartbeat RUN`` reads the files.

    Args:
        every_s: seconds between two files of a process; 0 writes none and starts no thread.
    """

    def __init__(self, every_s: float = 0) -> None:
        if not 0 <= every_s < math.inf:
            raise UserError(f"Got heartbeat.every_s = {every_s}, expected seconds between two files, or 0 for none.")
        self.every_s = every_s
        self._who: dict[str, Any] = {}
        self._where: tuple[int, int, str, float] = (0, 0, "setup", 0.0)
        """Optimizer steps, hooks passed since the last one, phase, when step or phase changed; replaced as a whole."""
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start writing."""
        if self.every_s == 0:
            return
        self._end("stopped")  # what an earlier fit of this trainer may have left running
        folder = Path(trainer.default_root_dir) / "heartbeat"
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:
            for file in folder.glob("rank*.json"):  # of an earlier start with more processes
                if int(file.stem.removeprefix("rank")) >= trainer.world_size:
                    file.unlink(missing_ok=True)
        self._who = {
            "rank": trainer.global_rank,
            "local_rank": trainer.local_rank,
            "world_size": trainer.world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "every_s": self.every_s,
        }
        self._where = (trainer.global_step, 0, "setup", time.monotonic())
        self._stop = threading.Event()
        if hasattr(faulthandler, "register"):  # not on Windows
            faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
        file = folder / f"rank{trainer.global_rank:05d}.json"
        self._thread = threading.Thread(target=self._beat, args=(file, self._stop), name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self, file: Path, stop: threading.Event) -> None:
        told = ended = False
        while not ended:
            ended = stop.is_set()  # seen before writing, so that the last file holds the last phase
            try:
                self._write(file)
            except OSError as error:  # a full disk is no reason to stop training
                if not told:
                    warnings.warn(f"No heartbeat could be written to {file}: {error}", stacklevel=2)
                told = True
            stop.wait(self.every_s)

    def _write(self, file: Path) -> None:
        step, hooks, phase, changed = self._where
        where = {"step": step, "hooks": hooks, "phase": phase, "since": round(time.monotonic() - changed, 3)}
        written = datetime.datetime.now(datetime.timezone.utc).isoformat()
        aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        aside.write_text(json.dumps({**self._who, **where, "written": written}))
        os.replace(aside, file)

    def _at(self, trainer: Trainer, phase: str) -> None:
        if self._thread is None:
            return
        step, (old_step, hooks, old_phase, changed) = trainer.global_step, self._where
        if step != old_step:
            self._where = (step, 0, phase, time.monotonic())
        else:
            self._where = (step, hooks + 1, phase, changed if phase == old_phase else time.monotonic())

    def _end(self, phase: str) -> None:
        if self._thread is None:
            return
        step, hooks, _, _ = self._where
        self._where = (step, hooks, phase, time.monotonic())
        self._stop.set()
        self._thread.join(timeout=10)
        self._thread = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch has arrived."""
        self._at(trainer, "training")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """The forward passes have been made."""
        self._at(trainer, "training")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The gradients have been reduced over all processes."""
        self._at(trainer, "training")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The optimizer has stepped, unless batches are accumulated."""
        self._at(trainer, "training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation, with its samples and FID, begins."""
        self._at(trainer, "validation")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A batch has arrived."""
        self._at(trainer, "validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training, or after the first look at the validation data to what comes before it."""
        if trainer.state.fn == "fit":
            self._at(trainer, "setup" if trainer.sanity_checking else "training")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`test` is a validation."""
        self._at(trainer, "validation")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`predict` samples."""
        self._at(trainer, "sampling")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is being written, until the next hook tells otherwise."""
        self._at(trainer, "checkpoint")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is done; the last checkpoint may follow."""
        self._at(trainer, "training")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write a last file and stop: an error, a signal or the keyboard ends this process."""
        self._end("stopped")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write a last file and stop."""
        self._end("finished")
