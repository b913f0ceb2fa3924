"""Power-function averages beside the constant decays, and their snapshots, from which any width is made after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mf_lightning.checkpoints import describe_net
from mf_lightning.checkpoints.snapshots import FOLDER, Header, checksum, drop_later, set_aside, write_snapshot
from mf_lightning.optim import average, compiled_average
from mf_lightning.profiles import check_width, exponent, newest_share
from mf_lightning.sharding import gathered, is_sharded, local
from mf_lightning.types import UserError

DTYPES = {"float16": torch.float16, "float32": torch.float32}


class PowerEMA(Callback):
    """Keep power-function averages (EDM2) and write snapshots, of which `python -m mf_lightning phema` makes other widths.

    Args:
        snapshot_every: optimizer steps between snapshots, and one at the end; null keeps no such averages. Fifty in a run let
            widths from 0.03 to 0.2 be made to 1 % (of the profile).
        sigma_rels: widths to keep, the profile's standard deviation over the steps so far, in (0, 0.2886]; null is [0.05, 0.1].
        folder: of snapshots; null is ``snapshots`` in trainer.default_root_dir.
        dtype: of snapshots; the averages themselves have the weights' own.
        on_cpu: keep the averages in main memory; each update then copies the weights there.
    """

    def __init__(
        self,
        snapshot_every: int | None = None,
        sigma_rels: list[float] | None = None,
        folder: str | None = None,
        dtype: Literal["float16", "float32"] = "float16",
        on_cpu: bool = False,
    ) -> None:
        sigma_rels = [0.05, 0.1] if sigma_rels is None else list(sigma_rels)
        widths = sorted(check_width(float(width), "phema.sigma_rels") for width in sigma_rels)
        if not widths or len({f"{width:.3f}" for width in widths}) != len(widths) or any(w != round(w, 3) for w in widths):
            raise UserError(
                f"Got phema.sigma_rels = {sigma_rels}, expected different numbers of at most three decimals. Two are enough, "
                "[0.05, 0.1]; phema.snapshot_every=null keeps none."
            )
        if snapshot_every is not None and snapshot_every < 1:
            raise UserError(f"Got phema.snapshot_every = {snapshot_every}, expected at least 1, or null for none.")
        self.snapshot_every = snapshot_every
        self.widths = widths if snapshot_every is not None else []
        self.folder = folder
        self.dtype = DTYPES[dtype]
        self.on_cpu = on_cpu
        self.weights: dict[float, dict[str, Tensor]] = {}
        self.run: str | None = None
        """Checksum of the run's first snapshot, which names the run; None before it, and on other processes than the first."""
        self._seen_step = 0
        self._written_step = 0
        self._average = average

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for the averages, or take them where the checkpoint left them; step 1 overwrites what they begin with."""
        sharded = is_sharded(pl_module.net)
        if self.widths and sharded and self.on_cpu:
            raise UserError(
                "Got phema.on_cpu = true under FSDP, expected false: averages are sharded like the weights. To keep all shards "
                "in main memory set trainer.strategy.init_args.cpu_offload."
            )
        for width in self.widths:
            saved = self.weights.get(width, {})
            self.weights[width] = {
                name: self._home(p.detach().clone()) if name not in saved else self._home(saved[name].to(p.device))
                for name, p in _trained(pl_module)
            }
        self._average = compiled_average() if pl_module.compiled and not (self.on_cpu or sharded) else average

    def _home(self, value: Tensor) -> Tensor:
        return value.cpu() if self.on_cpu else value

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove snapshots of steps that are still to come, of a run that was killed; set those of an earlier run aside."""
        self._seen_step = self._written_step = trainer.global_step
        if self.widths and not trainer.fast_dev_run:
            if trainer.is_global_zero and trainer.global_step == 0 and (aside := set_aside(self._folder(trainer))):
                rank_zero_info(f"Snapshots of an earlier run were moved to {aside}")
            elif trainer.is_global_zero:
                removed = drop_later(self._folder(trainer), trainer.global_step, self.run)
                if removed:
                    rank_zero_info(f"{removed} snapshots of steps after {trainer.global_step} removed: they are made again")
            trainer.strategy.barrier()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after each optimizer step (not after each accumulated batch); write a snapshot where one is due."""
        step = trainer.global_step
        if not self.widths or step == self._seen_step:
            return
        self._seen_step = step
        current = [local(self._home(p.detach())) for _, p in _trained(pl_module)]
        for width in self.widths:
            averages = [local(weight) for weight in self.weights[width].values()]
            self._average(averages, current, newest_share(step, exponent(width)))
        if step % self.snapshot_every == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step's, wherever it falls: profiles that end there need it."""
        if self.widths and self._written_step != trainer.global_step:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a snapshot of each width; every process calls it, the first one writes."""
        self._written_step = trainer.global_step
        if trainer.fast_dev_run:
            return
        pl_module.before_saving()
        first = trainer.is_global_zero
        for width in self.widths:
            own = {name: value for name, value in pl_module.net.state_dict().items() if name not in self.weights[width]}
            kept = {name: value.cpu() if first else None for name, value in gathered(own, keep=first).items()}
            averages = {name: self._stored(value, keep=first) for name, value in self.weights[width].items()}
            if first:
                tensors = {**averages, **kept}
                self.run = self.run or checksum(tensors)
                header = Header(
                    step=trainer.global_step,
                    sigma_rel=width,
                    run=self.run,
                    net=describe_net(pl_module.net),
                    data=trainer.datamodule.info.describe(),
                    fm_fraction=pl_module.loss.fm_fraction,
                    kept=tuple(sorted(kept)),
                    crc32=checksum(tensors),
                )
                write_snapshot(self._folder(trainer), tensors, header)

    def _stored(self, value: Tensor, *, keep: bool) -> Tensor | None:
        """Return an average whole, on the CPU, in the snapshots' dtype.

        Raises:
            UserError: it is too large for float16.
        """
        whole = gathered(value, keep=keep)
        if whole is None or not keep:
            return None
        stored = whole.detach().to("cpu", self.dtype)
        if not stored.isfinite().all():
            raise UserError(
                f"Got weights of up to {float(whole.abs().max()):.3g} for a snapshot, expected at most 65504, the largest of "
                "float16. Resume with --phema.dtype=float32."
            )
        return stored

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / FOLDER

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the averages by width, and the run's name."""
        if self.widths:
            weights = {str(width): dict(weights) for width, weights in self.weights.items()}
            checkpoint["phema"] = {"run": self.run, "weights": weights}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the averages back; scoring needs none.

        Raises:
            UserError: on resuming a fit with other widths than the checkpoint's.
        """
        if not trainer.training:
            return
        saved = checkpoint.get("phema", {"run": None, "weights": {}})
        found = {float(width): dict(weights) for width, weights in saved["weights"].items()}
        if set(found) != set(self.widths):
            how = f"--phema.sigma_rels='{sorted(found)}' and a number for phema.snapshot_every" if found else "null"
            raise UserError(
                f"Got a checkpoint with power averages of the widths {sorted(found) or 'none'}, expected "
                f"{self.widths or 'none'}, as phema is set: an average cannot be started "
                f"late. Set {how if found else 'phema.snapshot_every to null'}."
            )
        self.run, self.weights = saved["run"], found


def _trained(pl_module: LightningModule) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in pl_module.net.named_parameters() if p.requires_grad]
