"""Guards: stop a run that has gone wrong before it spoils its weights."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mf_lightning.types import UserError


class NonFiniteGuard(Callback):
    """Stop at a loss or gradient that is not finite, before it reaches the weights; the newest checkpoint stays good."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise, naming step and rows, if the loss is NaN or infinite."""
        if not bool(torch.isfinite(loss)):
            self._stop(trainer, pl_module, f"a loss of {float(loss)}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Raise if the gradient of a finite loss is not finite."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.net.parameters() if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            self._stop(trainer, pl_module, f"a gradient of norm {float(norm)}")

    def _stop(self, trainer: Trainer, pl_module: LightningModule, what: str) -> NoReturn:
        error = pl_module.last_terms.raw_error
        rows = torch.nonzero(~torch.isfinite(error))[:, 0].tolist()
        where = f"rows {rows[:8]} of its batch" if rows else f"largest raw error {float(error.max()):.3g}"
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        kept = f"The last good checkpoint is {last}." if last.exists() else "No checkpoint had been written yet."
        raise UserError(
            f"Got {what} at step {trainer.global_step}, process {trainer.global_rank}, {where}, expected a finite one. "
            f"{kept} Lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at those samples."
        )
