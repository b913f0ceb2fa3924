"""Export of samples: what `predict` writes."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer

from mf_lightning.callbacks.generate import LabelScheme, check_nfe, find_ema, generate
from mf_lightning.callbacks.sample_grid import to_picture
from mf_lightning.types import UserError


class SampleWriter(Callback):
    """What `predict` does: write ``samples/000000.png``, ... and ``samples/labels.csv``; image i depends on (seed, i) only.

    Args:
        num_samples: images to write.
        num_steps: jumps of the sampler, each one network pass.
        batch_size: images at a time on each device.
        labels: "balanced" (image i has class i mod K) or "uniform" (drawn by seed and i).
        seed: with an image's number it decides noise and label.
        folder: where to; null is ``samples`` in ``trainer.default_root_dir``.
    """

    def __init__(
        self,
        num_samples: int = 64,
        num_steps: int = 1,
        batch_size: int = 64,
        labels: LabelScheme = "balanced",
        seed: int = 0,
        folder: str | None = None,
    ) -> None:
        check_nfe("sample_writer.num_steps", [num_steps])
        if num_samples < 1 or batch_size < 1:
            raise UserError(
                f"Got sample_writer.num_samples = {num_samples}, batch_size = {batch_size}, expected at least 1 of each."
            )
        self.num_samples = num_samples
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.labels: LabelScheme = labels
        self.seed = seed
        self.folder = folder

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write this process's images: number i belongs to process i mod world_size."""
        folder = Path(self.folder or Path(trainer.default_root_dir) / "samples")
        folder.mkdir(parents=True, exist_ok=True)
        labels: list[tuple[int, int]] = []
        for images in generate(
            trainer,
            pl_module,
            torch.arange(self.num_samples),
            num_steps=self.num_steps,
            ema=find_ema(trainer).use,
            seed=self.seed,
            labels=self.labels,
            batch_size=self.batch_size,
        ):
            for picture, number in zip(images.pixels, images.index.tolist(), strict=True):
                to_picture(picture).save(folder / f"{number:06d}.png")
            if images.labels is not None:
                labels += zip(images.index.tolist(), images.labels.tolist(), strict=True)
        everyone = [labels]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, labels)
        if trainer.is_global_zero:
            with (folder / "labels.csv").open("w", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(["index", "label"])
                writer.writerows(sorted(row for part in everyone for row in part))
            print(f"Wrote {self.num_samples} images at {self.num_steps} NFE and labels.csv to {folder}")
