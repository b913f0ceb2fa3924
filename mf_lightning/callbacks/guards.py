"""Guards: stop a run that has gone wrong before it spoils its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mf_lightning.types import UserError


class NonFiniteGuard(Callback):
    """Stop at a loss that is not finite, before its gradients reach the weights; the newest checkpoint stays good."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise, naming step and rows, if the loss is NaN or infinite."""
        if bool(torch.isfinite(loss)):
            return
        error = pl_module.last_terms.raw_error
        rows = torch.nonzero(~torch.isfinite(error))[:, 0].tolist()
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        kept = f"The last good checkpoint is {last}." if last.exists() else "No checkpoint had been written yet."
        raise UserError(
            f"Got a loss of {float(loss)} at step {trainer.global_step}, process {trainer.global_rank}, rows "
            f"{rows[:8]} of its batch, expected a finite one. {kept} Lower the learning rate, clip gradients "
            "(trainer.gradient_clip_val), or look at those samples."
        )
