"""Guards: stop a run that has gone wrong before it spoils what it keeps, or leave out the step that would spoil it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from mf_lightning.types import UserError


class NonFiniteError(UserError):
    """A loss or gradient that is not finite; every process raises it at the same point of the run.

    Args:
        message: for the user.
        step: whose loss or gradient it is.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class HostCopy:
    """Numbers on their way from the device to the host, which waits for them only where it reads them.

    Args:
        values: (N,) on any device; on a GPU they travel through pinned memory.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Return the numbers, (N,)."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


@dataclass
class _Verdict:
    """Loss and gradient norm of a step, on their way to the host."""

    step: int
    numbers: HostCopy
    """This process's loss and gradient norm, whether any process has one that is not finite, and by process whether its own
    loss is not finite."""
    raw_error: Tensor
    """(B,) of all batches that were accumulated."""


class NonFiniteGuard(Callback):
    """Stop at a loss or gradient that is not finite, or leave its step out; nothing is ever kept of what it would spoil.

    All processes decide alike, at the same step. On a GPU the host does not wait for the numbers: they are read one step
    later, and before anything is written, validated or ended. Only to leave a step out must they be known before the
    optimizer runs: with ``skip`` the host then waits for the GPU once a step.

    Args:
        action: ``stop`` ends the run with a message and without a checkpoint of the step; ``skip`` leaves weights and
            optimizer state untouched at that step, counts it as ``train/skipped_steps`` and goes on.
        max_skips: steps of the whole run, resumed or not, that may be skipped; one more ends it.
        deferred: whether values are read one step later; null does so on a GPU, with ``stop``.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", max_skips: int = 10, deferred: bool | None = None) -> None:
        if action not in ("stop", "skip"):
            raise UserError(f"Got guard.action = {action!r}, expected 'stop' or 'skip'.")
        if max_skips < 0:
            raise UserError(f"Got guard.max_skips = {max_skips}, expected 0 or more. To skip none: guard.action=stop.")
        if action == "skip" and deferred:
            raise UserError(
                "Got guard.deferred = true with guard.action = skip, expected values that are known before the optimizer "
                "runs. Set guard.deferred to null, or guard.action to stop."
            )
        self.action = action
        self.max_skips = max_skips
        self.deferred = deferred
        self.skipped = 0
        """Steps left out so far in the whole run."""
        self._lags = bool(deferred)
        self._losses: list[Tensor] = []
        self._raw_errors: list[Tensor] = []
        self._pending: _Verdict | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on counting from."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier fit left, see which device this is, and judge before anything is saved."""
        on_gpu = pl_module.device.type == "cuda" and self.action == "stop"
        self._lags = on_gpu if self.deferred is None else self.deferred
        self._losses.clear()
        self._raw_errors.clear()
        self._pending = None
        pl_module.before_saving = lambda: self.settle(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss of each batch of the step."""
        self._losses.append(loss.detach())
        self._raw_errors.append(pl_module.last_terms.raw_error)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step before this one, or this one where its numbers are there or must be waited for."""
        self.settle(trainer)
        verdict = self._verdict(trainer, pl_module.gradient_norm())
        if self.action == "skip":
            self._skip_if_bad(trainer, verdict, optimizer)
            pl_module.log("train/skipped_steps", float(self.skipped), batch_size=1)
            return
        self._pending = verdict
        if not self._lags:
            self.settle(trainer)

    def _verdict(self, trainer: Trainer, norm: Tensor) -> _Verdict:
        loss = torch.stack(self._losses).sum()
        values = torch.stack([loss, norm.to(loss)])
        bad = ~torch.isfinite(values)
        flags = values.new_zeros(1 + trainer.world_size)
        flags[0], flags[1 + trainer.global_rank] = bad.any(), bad[0]
        if trainer.world_size > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        verdict = _Verdict(trainer.global_step, HostCopy(torch.cat([values, flags])), torch.cat(self._raw_errors))
        self._losses.clear()
        self._raw_errors.clear()
        return verdict

    def settle(self, trainer: Trainer) -> None:
        """Read the pending verdict, waiting for it if need be.

        Raises:
            NonFiniteError: loss or gradient norm is not finite; names step, process and rows.
        """
        verdict, self._pending = self._pending, None
        finding = None if verdict is None else _finding(verdict, trainer.global_rank)
        if finding is not None:
            raise NonFiniteError(
                f"Got {finding}, expected a finite one. {_kept(trainer)} Lower the learning rate, clip gradients "
                "(trainer.gradient_clip_val), look at those samples, or leave such steps out (guard.action=skip).",
                verdict.step,
            )

    def _skip_if_bad(self, trainer: Trainer, verdict: _Verdict, optimizer: Optimizer) -> None:
        finding = _finding(verdict, trainer.global_rank)
        if finding is None:
            return
        self.skipped += 1
        if self.skipped > self.max_skips:
            raise NonFiniteError(
                f"Got {finding}, skipped step number {self.skipped} of the run, expected at most guard.max_skips = "
                f"{self.max_skips}. {_kept(trainer)} Lower the learning rate, clip gradients (trainer.gradient_clip_val), "
                "look at those samples, or raise guard.max_skips.",
                verdict.step,
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        rank_zero_info(f"Skipped: {finding}; {self.skipped} of at most {self.max_skips} skipped steps.")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last step before its weights are scored."""
        self.settle(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last step of the run."""
        self.settle(trainer)


def _finding(verdict: _Verdict, rank: int) -> str | None:
    """Return what is not finite, at which step, in which process, in which rows; None if all is."""
    loss, norm, bad, *bad_losses = verdict.numbers.read()
    if not bad:
        return None
    processes = [process for process, flag in enumerate(bad_losses) if flag]
    if processes and rank not in processes:
        return f"a loss that is not finite at step {verdict.step}, in another process ({', '.join(map(str, processes))})"
    if math.isfinite(loss) and math.isfinite(norm):
        return f"a gradient that is not finite at step {verdict.step}, in another process"
    what = f"a gradient of norm {norm}" if math.isfinite(loss) else f"a loss of {loss}"
    rows = torch.nonzero(~torch.isfinite(verdict.raw_error))[:, 0].tolist()
    where = f"rows {rows[:8]} of its batch" if rows else f"largest raw error {float(verdict.raw_error.max()):.3g}"
    return f"{what} at step {verdict.step}, process {rank}, {where}"


def _kept(trainer: Trainer) -> str:
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    return f"The last good checkpoint is {last}." if last.exists() else "No checkpoint had been written yet."
