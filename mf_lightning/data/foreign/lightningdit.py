"""LightningDiT's latents: ``latents_rank00_shard000.safetensors``, about 10,000 images each.

Layout and content as in hustvl/LightningDiT ``extract_features.py``, ``datasets/img_latent_dataset.py`` and
``tokenizer/vavae.py`` (read in the copy victories24/LightningDiT-An-Experimental-Evaluation-on-ImageNet-Generation- 14c0442). A
file has ``latents`` and ``latents_flip``, (N, C, h, w), one draw of the posterior each, and ``labels``, (N,). They are NOT
normalised: training there subtracts ``latents_stats.pt``'s mean and divides by its std, channel by channel. A data set here has
one scale and one shift for all channels, so the stored values stay as they are, and scale and shift are asked for (``stats``
gives values). Order: sorted file names. Where several processes wrote them, torch's DistributedSampler may have repeated the
last images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mf_lightning.data.foreign.meanflow import to_numpy
from mf_lightning.data.foreign.source import RowFiles, Rows, check_sample, files_below, has_file, unreadable
from mf_lightning.types import UserError

KEYS = ("latents", "latents_flip")


class LightningDiTSource(RowFiles):
    """Latents in safetensors files.

    Args:
        path: the folder of the files.
        follow_links: also take what symbolic links out of the folder point to.
    """

    layout = "a folder with .safetensors files, each with latents, latents_flip and labels"
    holds = "latents"
    flip = True

    def __init__(self, path: Path, follow_links: bool = False) -> None:
        files = [path / name for name in sorted(files_below(path, ".safetensors", follow_links=follow_links, deep=False))]
        shapes = [self._shape(file) for file in files]
        super().__init__(files, [shape[0] for shape in shapes])
        first = self._rows(self.files[0], KEYS[0], np.arange(min(1, shapes[0][0])))
        if not len(self) or not len(first):
            raise UserError(
                f"Got no samples in '{self.files[0]}', expected some. Remove the file, or extract the latents again."
            )
        check_sample(first[0], f"'{self.files[0]}'")
        self.shape, self.dtype = first.shape[1:], first.dtype

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Look for the ending."""
        return has_file(path, ".safetensors", deep=False)

    def read(self, index: np.ndarray) -> Rows:
        """Read rows, each file opened once."""
        stored = np.empty((2, len(index), *self.shape), self.dtype)
        labels = np.empty(len(index), np.int64)
        for file, here, rows in self.by_file(index):
            for copy, key in enumerate(KEYS):
                values = self._rows(file, key, rows)
                self.check_like_first(values.shape[1:], values.dtype, f"{key} of '{file}'")
                stored[copy, here] = values
            labels[here] = self._rows(file, "labels", rows)
        return Rows(stored[0], labels, stored[1])

    def _shape(self, file: Path) -> list[int]:
        with _open(file) as content:
            shapes = {key: content.get_slice(key).get_shape() for key in (*KEYS, "labels") if key in content.keys()}  # noqa: SIM118
            integer = "labels" in shapes and content.get_slice("labels").get_dtype() in ("I64", "I32", "I16", "U8")
        if len(shapes) != 3 or shapes["latents"] != shapes["latents_flip"] or shapes["labels"] != shapes["latents"][:1]:
            told = ", ".join(f"{key} {tuple(shape)}" for key, shape in shapes.items()) or "none of them"
            raise UserError(
                f"Got {told} in '{file}', expected latents and latents_flip of one shape and a label for each of their rows. "
                "Check KIND and SOURCE, or extract the latents again."
            )
        if not integer:
            raise UserError(f"Got labels that are no whole numbers in '{file}', expected integers. Correct the labels.")
        return shapes["latents"]

    def _rows(self, file: Path, key: str, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.empty((0,))
        with _open(file) as content:
            first, last = int(rows.min()), int(rows.max()) + 1
            if last - first <= 2 * len(rows):  # a run of rows: one read
                return to_numpy(content.get_slice(key)[first:last])[rows - first]
            values = content.get_slice(key)
            return to_numpy(torch.cat([values[int(row) : int(row) + 1] for row in rows]))


def _open(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error
