"""Pictures to look at: one PNG grid per NFE at every validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from mf_lightning.callbacks.generate import check_nfe, find_ema, generate
from mf_lightning.types import UserError


def to_picture(pixels: Tensor) -> Image.Image:
    """Return one uint8 picture, (1 or 3, H, W), as a PIL image."""
    array = pixels.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.moveaxis(array, 0, -1))


def tile(pixels: Tensor, *, columns: int, gap: int = 2) -> Tensor:
    """Return one picture, (c, H', W'), of uint8 pictures, (N, c, H, W), row by row, with a mid-grey gap between them."""
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 128, dtype=torch.uint8)
    for number, picture in enumerate(pixels.cpu()):
        top, left = (gap + (number // columns) * (height + gap), gap + (number % columns) * (width + gap))
        sheet[:, top : top + height, left : left + width] = picture
    return sheet


class SampleGrid(Callback):
    """Write ``grids/step00001240_nfe1.png`` at every validation: a column is a class, the noise is the same at each NFE.

    Args:
        nfe: sampling steps, one grid each; null is [1, 2].
        rows: pictures per column; 0 writes no grids.
        max_columns: classes shown, the first ones.
        seed: with a picture's number it decides its noise.
        scale: each pixel is drawn this many pixels wide.
    """

    def __init__(
        self, nfe: list[int] | None = None, rows: int = 8, max_columns: int = 10, seed: int = 0, scale: int = 1
    ) -> None:
        if rows < 0 or max_columns < 1 or scale < 1:
            raise UserError(
                f"Got sample_grid.rows = {rows}, max_columns = {max_columns}, scale = {scale}, expected rows of at least 0 "
                "(none) and the others of at least 1."
            )
        self.nfe = check_nfe("sample_grid.nfe", [1, 2] if nfe is None else nfe)
        self.rows = rows
        self.max_columns = max_columns
        self.seed = seed
        self.scale = scale

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on every process, and write on the first; the sanity check draws nothing."""
        if trainer.sanity_checking or self.rows == 0 or trainer.datamodule.autoencoder is None:
            return
        classes = pl_module.net.y_null or 0
        columns = min(classes, self.max_columns) if classes else self.max_columns
        stride = classes or columns  # image i has class i mod classes, so column k of row j is image j * classes + k
        index = (torch.arange(self.rows)[:, None] * stride + torch.arange(columns)).flatten()
        folder = Path(trainer.default_root_dir) / "grids"
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
        for num_steps in self.nfe:
            batches = generate(
                trainer,
                pl_module,
                index,
                num_steps=num_steps,
                ema=find_ema(trainer).use,
                seed=self.seed,
                labels="balanced",
                batch_size=64,
                everywhere=True,
                progress=False,
            )
            pixels = torch.cat([images.pixels.cpu() for images in batches])
            if not trainer.is_global_zero:
                continue
            sheet = tile(pixels, columns=columns)
            picture = to_picture(sheet)
            picture = picture.resize((picture.width * self.scale, picture.height * self.scale), Image.Resampling.NEAREST)
            picture.save(folder / f"step{pl_module.trained_steps:08d}_nfe{num_steps}.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image(f"samples/nfe{num_steps}", [picture], step=trainer.global_step)
