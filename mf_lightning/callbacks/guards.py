"""Guards: stop a run that has gone wrong before it spoils what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mf_lightning.types import UserError


@dataclass
class _Verdict:
    """Loss and gradient norm of a step, on their way to the host."""

    step: int
    values: Tensor
    """(2,) on the CPU: loss, gradient norm."""
    raw_error: Tensor
    """(B,) of all batches that were accumulated."""
    arrived: torch.cuda.Event | None
    """None where the values are there at once."""


class NonFiniteGuard(Callback):
    """Stop at a loss or gradient that is not finite; no checkpoint is ever written of what follows it.

    On a CPU the step's weights are not touched either. On a GPU the host does not wait for the numbers: they are read one
    step later, and before anything is written, validated or ended.

    Args:
        deferred: whether values are read one step later; null does so on a GPU.
    """

    def __init__(self, deferred: bool | None = None) -> None:
        self.deferred = deferred
        self._lags = bool(deferred)
        self._losses: list[Tensor] = []
        self._raw_errors: list[Tensor] = []
        self._pending: _Verdict | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier fit left, see which device this is, and judge before anything is saved."""
        self._lags = pl_module.device.type == "cuda" if self.deferred is None else self.deferred
        self._losses.clear()
        self._raw_errors.clear()
        self._pending = None
        pl_module.before_saving = lambda: self.settle(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss of each batch of the step; where reading it costs nothing, stop before the backward pass."""
        self._losses.append(loss.detach())
        self._raw_errors.append(pl_module.last_terms.raw_error)
        if not self._lags and not bool(torch.isfinite(loss)):
            self._stop(trainer, self._verdict(trainer, torch.zeros_like(loss)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step before this one, or on a CPU this one."""
        self.settle(trainer)
        self._pending = self._verdict(trainer, pl_module.gradient_norm())
        if not self._lags:
            self.settle(trainer)

    def _verdict(self, trainer: Trainer, norm: Tensor) -> _Verdict:
        values = torch.stack([torch.stack(self._losses).sum(), norm.to(self._losses[0].dtype)])
        raw_error = torch.cat(self._raw_errors)
        self._losses.clear()
        self._raw_errors.clear()
        arrived = None
        if values.device.type == "cuda":
            on_host = torch.empty(2, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            values, arrived = on_host, torch.cuda.Event()
            arrived.record()
        return _Verdict(trainer.global_step, values, raw_error, arrived)

    def settle(self, trainer: Trainer) -> None:
        """Read the pending verdict, waiting for it if need be.

        Raises:
            UserError: loss or gradient norm is not finite; names step, process and rows.
        """
        verdict, self._pending = self._pending, None
        if verdict is None:
            return
        if verdict.arrived is not None:
            verdict.arrived.synchronize()
        if not bool(torch.isfinite(verdict.values).all()):
            self._stop(trainer, verdict)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last step before its weights are scored."""
        self.settle(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last step of the run."""
        self.settle(trainer)

    def _stop(self, trainer: Trainer, verdict: _Verdict) -> NoReturn:
        loss, norm = verdict.values.tolist()
        what = f"a gradient of norm {norm}" if torch.isfinite(verdict.values[0]) else f"a loss of {loss}"
        rows = torch.nonzero(~torch.isfinite(verdict.raw_error))[:, 0].tolist()
        where = f"rows {rows[:8]} of its batch" if rows else f"largest raw error {float(verdict.raw_error.max()):.3g}"
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        kept = f"The last good checkpoint is {last}." if last.exists() else "No checkpoint had been written yet."
        raise UserError(
            f"Got {what} at step {verdict.step}, process {trainer.global_rank}, {where}, expected a finite one. "
            f"{kept} Lower the learning rate, clip gradients (trainer.gradient_clip_val), or look at those samples."
        )
