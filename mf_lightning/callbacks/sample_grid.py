"""Pictures to look at: one PNG grid per NFE at every validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from mf_lightning.callbacks.generate import find_ema, generate
from mf_lightning.data.datamodule import LatentData
from mf_lightning.draws import Stream
from mf_lightning.flow.sampler import AverageSampler, Sampler, check_nfe
from mf_lightning.sheet import blank, labelled_grid, pick_real, tile, to_picture
from mf_lightning.types import UserError


class SampleGrid(Callback):
    """Write grids at every validation, for the eye.

    ``grids/step00001240.png`` compares numbers of steps: a column is one noise and class, the rows are NFE 1, 2, 4 and, last,
    real images of the class, decoded. ``grids/step00001240_nfe1.png`` shows more images at one: a column is a class. W&B and
    TensorBoard get them as ``samples/grid`` and ``samples/nfe1``.

    Args:
        nfe: sampling steps, one row and one grid each; null is [1, 2, 4].
        rows: pictures per column of a grid of one NFE; 0 writes no grids at all.
        max_columns: classes shown, the first ones.
        seed: with a picture's number it decides its noise.
        scale: each pixel is drawn this many pixels wide.
        sampler: how a jump is made; null is AverageSampler, EulerSampler is for flow matching.
    """

    def __init__(
        self,
        nfe: list[int] | None = None,
        rows: int = 8,
        max_columns: int = 10,
        seed: int = 0,
        scale: int = 1,
        sampler: Sampler | None = None,
    ) -> None:
        if rows < 0 or max_columns < 1 or scale < 1:
            raise UserError(
                f"Got sample_grid.rows = {rows}, max_columns = {max_columns}, scale = {scale}, expected rows of at least 0 "
                "(none) and the others of at least 1."
            )
        self.nfe = check_nfe("sample_grid.nfe", [1, 2, 4] if nfe is None else nfe)
        self.rows = rows
        self.max_columns = max_columns
        self.seed = seed
        self.scale = scale
        self.sampler = sampler or AverageSampler()
        self._real: Tensor | None = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on every process, and write on the first; the sanity check draws nothing."""
        if trainer.sanity_checking or self.rows == 0 or trainer.datamodule.autoencoder is None:
            return
        classes = pl_module.net.y_null or 0
        columns = min(classes, self.max_columns) if classes else self.max_columns
        stride = classes or columns  # image i has class i mod classes, so column k of row j is image j * classes + k
        index = (torch.arange(self.rows)[:, None] * stride + torch.arange(columns)).flatten()
        grids: dict[str, Image.Image] = {}
        compared: dict[str, Tensor] = {}
        for num_steps in self.nfe:
            pixels = self._generated(trainer, pl_module, index, num_steps)
            if trainer.is_global_zero:
                picture = to_picture(tile(pixels, columns=columns))
                size = picture.width * self.scale, picture.height * self.scale
                grids[f"nfe{num_steps}"] = picture.resize(size, Image.Resampling.NEAREST)
                compared[f"NFE {num_steps}"] = pixels[: self.max_columns]
        if trainer.is_global_zero:
            labels = (index % classes).tolist()[: self.max_columns] if classes else None
            if self._real is None:
                self._real = real_pictures(trainer.datamodule, labels, len(compared[f"NFE {self.nfe[0]}"]), pl_module.device)
            names = trainer.datamodule.info.class_names
            titles = [""] * len(self._real) if labels is None else [names[label] for label in labels]
            grids["grid"] = labelled_grid({**compared, "real": self._real}, titles, scale=self.scale)
            self._write(trainer, pl_module, grids)

    def _generated(self, trainer: Trainer, pl_module: LightningModule, index: Tensor, num_steps: int) -> Tensor:
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
            sampler=self.sampler,
        )
        return torch.cat([images.pixels.cpu() for images in batches])

    def _write(self, trainer: Trainer, pl_module: LightningModule, grids: dict[str, Image.Image]) -> None:
        folder, step = Path(trainer.default_root_dir) / "grids", pl_module.trained_steps
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in grids.items():
            picture.save(folder / (f"step{step:08d}.png" if name == "grid" else f"step{step:08d}_{name}.png"))
        caption = f"step {step}; a column is one noise and class, the last row is real"
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for name, picture in grids.items():
                    words = [caption if name == "grid" else f"step {step}, {name}"]
                    logger.log_image(f"samples/{name}", [picture], step=trainer.global_step, caption=words)
            elif isinstance(logger, TensorBoardLogger):
                for name, picture in grids.items():
                    pixels = np.asarray(picture.convert("RGB"))
                    logger.experiment.add_image(f"samples/{name}", pixels, trainer.global_step, dataformats="HWC")


@torch.no_grad()
def real_pictures(data: LatentData, labels: list[int] | None, count: int, device: torch.device) -> Tensor:
    """Return decoded real samples, (count, c, H, W) uint8, one of each class asked for; white where there is none.

    Args:
        data: validation samples are taken first, training samples for classes that it lacks.
        labels: class of each picture; None takes any.
        count: pictures.
        device: that decodes.
    """
    found: list[Tensor | None] = [None] * count
    for name in (data.val_split, "train"):
        if all(picture is not None for picture in found):
            break
        split = data.split(name)
        known = split.remote.labels() if split.labels is None else split.labels
        known = known if split.rows is None else known[split.rows]
        for column, number in enumerate(pick_real(known, labels, count)):
            if found[column] is None and number >= 0:
                stored = torch.from_numpy(split.gather(np.array([number]))[0]).to(device)
                rows = torch.tensor([number])
                latents = data.to_latents(stored, stream=Stream.VAL_MOMENTS, step=0, rows=rows)
                found[column] = data.decode(latents)[0].cpu()
    like = next((picture for picture in found if picture is not None), None)
    assert like is not None, "a data set has samples"
    return torch.stack([blank(like) if picture is None else picture for picture in found])
