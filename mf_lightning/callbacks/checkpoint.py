"""Checkpoints that are whole or absent, and readable without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mf_lightning.types import UserError


class LastCheckpoint(Checkpoint):
    """Keep the newest state in the one file ``last.ckpt``: at every validation, between far ones, and at the end.

    Args:
        folder: where ``last.ckpt`` is written.
        every_n_steps: optimizer steps between saves besides those at validations.
    """

    def __init__(self, folder: str, every_n_steps: int = 5000) -> None:
        if every_n_steps < 1:
            raise UserError(f"Got every_n_steps = {every_n_steps} for last.ckpt, expected at least 1.")
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._saved_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between validations."""
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._saved_step:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at a validation inside `fit`."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, wherever validations fall."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(self.path)


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint whose FID at one NFE is lowest: the best for one step is often not the best for two.

    It acts where evaluation scores that NFE, and rests where evaluation is off or compares other counts.

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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare and save, where the figure was logged."""
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write aside, then rename, so that an earlier checkpoint survives a full disk or a kill; load plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write a checkpoint under a temporary name, flush it to disk and rename it.

        Raises:
            UserError: the disk is full or not writable; what was at ``path`` is still there.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
        except (OSError, RuntimeError) as error:
            kept = f"The earlier {path} is still whole." if path.exists() else "Nothing was written."
            raise UserError(
                f"Got no checkpoint written to {path} ({error}), expected space for it. {kept} Free some space and resume, "
                "or change trainer.default_root_dir."
            ) from error
        finally:
            aside.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | os.PathLike, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Read a checkpoint with ``weights_only``: no code in it is ever run.

        Raises:
            UserError: no such file, a truncated one, or one that needs code.
        """
        import pickle

        file = Path(path)
        if not file.is_file():
            raise UserError(f"Got the checkpoint '{path}', which is no file, expected one such as checkpoints/last.ckpt.")
        try:
            return torch.load(file, map_location=map_location or "cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"Got the checkpoint '{path}', which cannot be read ({str(error).splitlines()[0]}), expected a whole one of "
                "plain values. Use another checkpoint of the run."
            ) from error
