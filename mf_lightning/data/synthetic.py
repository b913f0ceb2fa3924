"""Data that needs no preparation: seven-segment digits drawn from a seed, for the smoke recipe and for tests."""

from __future__ import annotations

import numpy as np
import torch

from mf_lightning import draws
from mf_lightning.data.datamodule import LatentData
from mf_lightning.data.loader import LatentSplit
from mf_lightning.data.shards import DatasetInfo, OpenShard, ShardInfo
from mf_lightning.draws import Stream
from mf_lightning.types import Autoencoder

SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
"""Which of the seven segments each digit lights, in the usual lettering (a top, clockwise, g middle)."""

_STROKES = {  # top, left, height, width of each segment on a 32 x 32 picture
    "a": (6, 11, 3, 10),
    "b": (6, 19, 11, 3),
    "c": (15, 19, 11, 3),
    "d": (23, 11, 3, 10),
    "e": (15, 10, 11, 3),
    "f": (6, 10, 11, 3),
    "g": (15, 11, 3, 10),
}


def seven_segment_digits(labels: np.ndarray, *, seed: int, first: int) -> np.ndarray:
    """Return pictures in [-1, 1], (N, 1, 32, 32) float32, each shifted by up to 3 pixels and of its own brightness.

    Args:
        labels: digits, (N,).
        seed: of the shifts and brightnesses.
        first: number of the first picture; picture i is a function of (seed, first + i).
    """
    rows = torch.arange(first, first + len(labels))
    draw = draws.uniform(seed, Stream.SYNTHETIC, step=0, rows=rows, count=3).numpy()
    shifts = np.floor(draw[:, :2] * 7).astype(int) - 3
    pictures = np.full((len(labels), 1, 32, 32), -1, np.float32)
    for picture, label, (down, right), brightness in zip(pictures, labels, shifts, draw[:, 2], strict=True):
        for segment in SEGMENTS[label]:
            top, left, height, width = _STROKES[segment]
            top, left = top + down, left + right
            picture[0, top : top + height, left : left + width] = np.float32(0.4 + 0.6 * brightness)
    return pictures


class SevenSegmentDataModule(LatentData):
    """Seven-segment digits in memory, classes balanced; the network works on pixels.

    Args:
        autoencoder: the pixel autoencoder; null trains without any evaluation that needs pictures.
        train_size: number of training pictures.
        val_size: number of validation pictures.
        batch_size: rows per optimizer step over all devices and accumulated batches.
        eval_batch_size: validation rows per device.
        seed: decides pictures and order.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | None = None,
        train_size: int = 512,
        val_size: int = 64,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.sizes = {"train": (0, train_size), "val": (train_size, val_size)}
        info = DatasetInfo(
            kind="latents",
            latent_shape=(1, 32, 32),
            dtype="float32",
            flip=False,
            autoencoder="pixel",
            scale=1.0,
            shift=0.0,
            image_size=32,
            class_names=tuple("0123456789"),
            splits={name: (ShardInfo("memory", size, {}),) for name, (_, size) in self.sizes.items()},
        )
        super().__init__(info, autoencoder, batch_size=batch_size, eval_batch_size=eval_batch_size, val_split="val", seed=seed)

    def load_split(self, name: str) -> LatentSplit:
        """Draw the pictures of a split."""
        first, size = self.sizes[name]
        labels = np.arange(first, first + size) % 10
        return LatentSplit([OpenShard(seven_segment_digits(labels, seed=self.seed, first=first), labels, None)])
