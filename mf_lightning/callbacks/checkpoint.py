"""When checkpoints are written, and what Lightning's part of them says about where a run stands."""

from __future__ import annotations

import os
import socket
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mf_lightning.callbacks.csv_log import MetricsCSV
from mf_lightning.callbacks.preemption import Preempted
from mf_lightning.callbacks.sample_eval import SampleEval
from mf_lightning.checkpoints import LAST, read_checkpoint, tidy, write_checkpoint
from mf_lightning.types import UserError


class LastCheckpoint(Checkpoint):
    """Keep the newest state as ``last.ckpt``: after every validation, between far ones, at the end, and when preempted.

    States are written between two steps, when all that was logged of the earlier one is on disk, so that a resumed run repeats
    and loses nothing. ``last.ckpt`` is a link to ``step00000120.ckpt``; the checkpoint before it is kept as well.

    Args:
        folder: where ``last.ckpt`` is written.
        every_n_steps: optimizer steps between saves besides those after validations.
    """

    def __init__(self, folder: str, every_n_steps: int = 5000) -> None:
        if every_n_steps < 1:
            raise UserError(f"Got every_n_steps = {every_n_steps} for last.ckpt, expected at least 1.")
        self.path = Path(folder) / LAST
        self.every_n_steps = every_n_steps
        self._saved_step = -1
        self._validating = False
        self._validated = False
        self._validation_due = False
        self._max_steps: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Where there are several processes, see that they resume from one checkpoint, and that nodes share the folder."""
        if stage == "fit" and trainer.world_size > 1:
            check_same_start(trainer.ckpt_path)
        if stage == "fit" and trainer.num_nodes > 1:
            check_shared(trainer, self.path.parent)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away what a killed run left half written; do the validation inside which a run was preempted."""
        self._saved_step = trainer.global_step
        self._validating = self._validated = False
        if trainer.is_global_zero:
            tidy(self.path.parent)
        trainer.strategy.barrier()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.start_from(trainer.global_step)
        loop = trainer.fit_loop.epoch_loop
        if self._max_steps is not None:
            loop.max_steps, self._max_steps = self._max_steps, None
        if self._validation_due:
            self._validation_due = False
            _validate(trainer)
        if loop.restarting:  # loggers count by it; Lightning, resumed behind a validation, first counts a step that it skips
            skips = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
            loop._batches_that_stepped = trainer.global_step - int(skips)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that what happens now belongs to a validation."""
        self._validating = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before the next step."""
        self._validated, self._validating = self._validating, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save, where a validation or many steps have passed."""
        due = self._validated or (trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._saved_step)
        if due and batch_idx % trainer.accumulate_grad_batches == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, wherever validations fall."""
        if self._validated or trainer.global_step != self._saved_step:
            self._save(trainer)
        _finish_writing(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when preempted: all processes come here together."""
        if isinstance(exception, Preempted):
            if self._validated or self._validating or trainer.global_step != self._saved_step:
                self._save(trainer)
            _finish_writing(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._validated = False
        if trainer.fast_dev_run:
            return
        for logger in trainer.loggers:
            logger.save()
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether a validation is still to be done."""
        checkpoint["resume"] = {"validation_due": self._validating}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set Lightning's counters to the step, as this run cuts steps and epochs; see that a due validation is done."""
        if not trainer.training:
            return
        self._validation_due = checkpoint.get("resume", {}).get("validation_due", False)
        loops, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
        total, limit = step * trainer.accumulate_grad_batches, trainer.limit_train_batches
        whole = trainer.datamodule.steps_per_epoch * trainer.accumulate_grad_batches
        epoch, current = divmod(total, min(limit, whole) if isinstance(limit, int) else int(limit * whole))
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        for counts, number in ((batches["total"], total), (batches["current"], current)):
            counts.update(dict.fromkeys(counts, number))
        validation = loops["epoch_loop.val_loop.batch_progress"]
        for counts in (validation["total"], validation["current"]):
            counts.update(dict.fromkeys(counts, 0))
        batches["is_last_batch"] = validation["is_last_batch"] = False
        for counts in (epochs["total"], epochs["current"]):
            counts.update(ready=epoch + 1, started=epoch + 1, processed=epoch, completed=epoch)
        if self._validation_due and trainer.max_steps == checkpoint["global_step"]:
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps += 1  # or Lightning would end before the hook that validates


def check_same_start(checkpoint: str | Path | None) -> None:
    """See that all processes resume from one checkpoint, or start anew; every process calls it.

    Raises:
        UserError: in all processes, naming what each of two would do.
    """
    mine = "nothing" if checkpoint is None else os.path.realpath(checkpoint)
    seen: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (mine, socket.gethostname()))
    (first, home), other = seen[0], next((each for each in seen if each[0] != seen[0][0]), None)
    if other is not None:
        raise UserError(
            f"Got a run to resume from {first} on {home} and from {other[0]} on {other[1]}, expected one checkpoint for all. A "
            "network file system may show a node an older state: start the job again, or name the checkpoint with --ckpt_path."
        )


def check_shared(trainer: Trainer, folder: Path, wait_s: float = 60.0) -> None:
    """See that all processes find in a folder what the first one writes there; every process calls it.

    Raises:
        UserError: in all processes, naming the nodes that do not (after ``wait_s``, since network file systems may be late).
    """
    marker = folder / f".{trainer.strategy.broadcast(uuid.uuid4().hex)}.shared"
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    trainer.strategy.barrier()
    limit = time.monotonic() + wait_s
    while not marker.exists() and time.monotonic() < limit:
        time.sleep(0.1)
    blind: list[str | None] = [None] * trainer.world_size
    dist.all_gather_object(blind, None if marker.exists() else socket.gethostname())
    if trainer.is_global_zero:
        marker.unlink()
    hosts = sorted({host for host in blind if host is not None})
    if hosts:
        raise UserError(
            f"Got a folder that not all nodes share: {', '.join(hosts)} do(es) not see what process 0 wrote to {folder}, "
            "expected one for all, for checkpoints and resuming. Give --trainer.default_root_dir on a shared file system."
        )


def _validate(trainer: Trainer) -> None:
    """Run the validation of the step that a resumed run starts from, as Lightning does after a batch."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    loop._batches_that_stepped = trainer.global_step - 1
    first = connector._first_loop_iter
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def _finish_writing(trainer: Trainer) -> None:
    """Wait for what is written in the background."""
    for owner, name in ((trainer.strategy, "wait_for_checkpoint"), (trainer.strategy.checkpoint_io, "wait")):
        if hasattr(owner, name):
            getattr(owner, name)()


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint whose FID at one NFE is lowest: the best for one step is often not the best for two.

    It acts where evaluation scores that NFE, and rests where evaluation is off or compares other counts. Under another protocol
    than before, or with another average (a resumed run with more images, another reference), the comparison begins anew.

    Args:
        folder: where ``best_nfe1.ckpt`` is written.
        nfe: sampling steps whose ``fid/nfe1`` is compared.
    """

    def __init__(self, folder: str, nfe: int) -> None:
        super().__init__(
            folder,
            filename=f"best_nfe{nfe}",
            monitor=f"fid/nfe{nfe}",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.protocol: str | None = None
        """Id of the protocol, and average, with which the best so far was measured."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare and save, where the figure was logged."""
        if self.monitor not in trainer.callback_metrics:
            return
        made = [
            f"{row['protocol_id']} {c.first}" for c in trainer.callbacks if isinstance(c, SampleEval) for row in c.rows[-1:]
        ]
        now = made[0] if made else None
        if self.protocol not in (None, now) and not trainer.sanity_checking:
            self.best_k_models, self.kth_best_model_path, self.kth_value = {}, "", torch.tensor(torch.inf)
            self.best_model_path, self.best_model_score = "", None
        self.protocol = now
        super().on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state and the protocol."""
        return {**super().state_dict(), "protocol": self.protocol}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back; checkpoints of earlier versions hold no protocol."""
        self.protocol = state_dict.get("protocol")
        super().load_state_dict(state_dict)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write aside, then rename, so that an earlier checkpoint survives a full disk or a kill; check and load plain values only.

    Args:
        background: copy the state and write it while training goes on. It takes the memory of the copy. A write that fails is
            told at the next one, or at the end.
    """

    def __init__(self, background: bool = False) -> None:
        self.background = background
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write a checkpoint in one file.

        Raises:
            UserError: the disk is full or not writable; what was at ``path`` is still there.
        """
        if not self.background:
            write_checkpoint(checkpoint, path)
            return
        self.wait()
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = self._thread.submit(write_checkpoint, _copied(checkpoint), path)

    def wait(self) -> None:
        """Wait until what is written in the background is whole.

        Raises:
            UserError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_checkpoint(self, path: str | os.PathLike, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Read a file or a directory of shards, whole, with ``weights_only``: no code in it is ever run.

        Raises:
            UserError: no such checkpoint, a truncated or altered one, or one that needs code.
        """
        return read_checkpoint(path, mmap=torch.cuda.is_available())  # or every process of a node would hold a copy

    def teardown(self) -> None:
        """Finish writing."""
        self.wait()


def _copied(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(_copied, tree))
    return tree
