"""Exponential moving averages of the network's weights, any number of decays at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mf_lightning.optim import average, compiled_average
from mf_lightning.sharding import is_sharded, local
from mf_lightning.types import UserError


class EMA(Callback):
    """Keep averages ``w <- d w + (1 - d) theta`` of the network's parameters, updated at every optimizer step.

    Args:
        decays: one average each, in (0, 1); null is [0.9999], the papers' on ImageNet. An empty list keeps none.
        warmup: let update n (from 0) use ``min(d, (1 + n) / (10 + n))``, so that short runs forget their start.
        use: the average that evaluation, grids and `predict` take; null is the first of ``decays``.
        on_cpu: keep the averages in main memory; each update then copies the weights there.
    """

    def __init__(
        self, decays: list[float] | None = None, warmup: bool = False, use: float | None = None, on_cpu: bool = False
    ) -> None:
        decays = [0.9999] if decays is None else list(decays)
        if any(not 0 < decay < 1 for decay in decays) or len(set(decays)) != len(decays):
            raise UserError(f"Got ema.decays = {decays}, expected different numbers in (0, 1).")
        if use is not None and use not in decays:
            raise UserError(f"Got ema.use = {use}, expected one of ema.decays = {decays}.")
        self.decays = decays
        self.warmup = warmup
        self.use = use if use is not None else (decays[0] if decays else None)
        self.on_cpu = on_cpu
        self.updates = 0
        self.weights: dict[float, dict[str, Tensor]] = {}
        self._seen_step = 0
        self._average = average

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start every average at the weights, or where the checkpoint left it."""
        sharded = is_sharded(pl_module.net)
        if sharded and self.on_cpu:
            raise UserError(
                "Got ema.on_cpu = true under FSDP, expected false: averages are sharded like the weights. To keep all "
                "shards in main memory set trainer.strategy.init_args.cpu_offload."
            )
        for decay in self.decays:
            if decay not in self.weights:
                self.weights[decay] = {name: self._home(p.detach().clone()) for name, p in _parameters(pl_module)}
        self._to_device(pl_module)
        self._average = compiled_average() if pl_module.compiled and not (self.on_cpu or sharded) else average

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the optimizer step, which a resumed trainer knows only now."""
        self._seen_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring loaded averages to the device."""
        self._to_device(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def _home(self, value: Tensor) -> Tensor:
        return value.cpu() if self.on_cpu else value

    def _to_device(self, pl_module: LightningModule) -> None:
        if not self.on_cpu:
            devices = {name: parameter.device for name, parameter in _parameters(pl_module)}
            for weights in self.weights.values():
                for name in weights:
                    weights[name] = weights[name].to(devices[name])

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after each optimizer step (not after each accumulated batch)."""
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        current = [local(self._home(p.detach())) for _, p in _parameters(pl_module)]
        for decay in self.decays:
            now = min(decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else decay
            self._average([local(weight) for weight in self.weights[decay].values()], current, 1 - now)
        self.updates += 1

    @contextmanager
    def applied(self, pl_module: LightningModule, decay: float | None) -> Iterator[None]:
        """Run the network with an average's weights inside the block; None is the raw weights.

        Raises:
            UserError: there is no such average.
        """
        if decay is None:
            yield
            return
        if decay not in self.weights:
            raise UserError(
                f"Got a request for the EMA of decay {decay}, expected one that exists: {sorted(self.weights) or 'none'}. "
                "Change ema.decays, ema.use or sample_eval.emas; a checkpoint holds only the averages it was trained with."
            )
        weights = self.weights[decay]
        swapped: list[tuple[Tensor, Tensor]] = []
        try:
            for name, parameter in _parameters(pl_module):
                swapped.append(_swap(local(parameter), local(weights[name])))
            yield
        finally:
            for pair in swapped:
                _swap(*pair)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the averages by decay; ``state_dict`` holds the raw weights."""
        checkpoint["ema"] = {
            "updates": self.updates,
            "use": None if self.use is None else str(self.use),
            "weights": {str(decay): dict(weights) for decay, weights in self.weights.items()},
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the averages back.

        Raises:
            UserError: on resuming a fit with other decays than the checkpoint's.
        """
        saved = checkpoint.get("ema", {"updates": 0, "weights": {}})
        found = {float(decay): dict(weights) for decay, weights in saved["weights"].items()}
        if trainer.training and set(found) != set(self.decays):
            raise UserError(
                f"Got a checkpoint with the EMA decays {sorted(found)}, expected ema.decays = {sorted(self.decays)}. Set "
                "ema.decays to the checkpoint's: an average cannot be started late."
            )
        if "imported" in checkpoint:  # weights alone: an average that was never updated is where it begins
            names = [name for name, _ in _parameters(pl_module)]
            found = {decay: {name: checkpoint["state_dict"][f"net.{name}"] for name in names} for decay in self.decays}
        self.updates = saved["updates"]
        self.weights = found


@torch.no_grad()
def _swap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange the values of two tensors in place (a shard's memory is known to FSDP, and cannot be replaced); return them."""
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)
    return one, other


def _parameters(pl_module: LightningModule) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in pl_module.net.named_parameters() if p.requires_grad]
