"""The picture that `verify` draws: a few samples of a split, decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mf_lightning import draws
from mf_lightning.data.shards import DatasetInfo
from mf_lightning.draws import Stream
from mf_lightning.pipeline.autoencoder import open_autoencoder
from mf_lightning.pixels import to_uint8
from mf_lightning.types import UserError

PICTURES, COLUMNS, GAP = 32, 8, 2


class Grid:
    """Samples spread over the first split that has any, taken while it is read, shard by shard.

    Args:
        file: .png file to write.
        info: of the data set.
        autoencoder: turns latents into pictures; without it the one that the data set names.

    Raises:
        UserError: no samples, or not the autoencoder that made them.
    """

    def __init__(self, file: Path, info: DatasetInfo, autoencoder: str | None) -> None:
        if file.suffix != ".png":
            raise UserError(f"Got --grid {file}, expected a name that ends in .png.")
        split = next((name for name in info.splits if info.count(name)), None)
        if split is None:
            raise UserError("Got no samples in the data set, expected some to make pictures of. Leave --grid out.")
        self.file, self.info, self.split = file, info, split
        self.autoencoder = open_autoencoder(autoencoder or info.autoencoder, info)
        count = info.count(split)
        self.numbers = np.unique(np.linspace(0, count - 1, min(count, PICTURES // (2 if info.flip else 1))).astype(int))
        self.rows: dict[str, list[np.ndarray]] = {ending: [] for ending in info.files}

    def take(self, split: str, ending: str, first: int, array: np.ndarray) -> None:
        """Keep the wanted rows of a file whose first row has the number ``first``."""
        if split == self.split:
            wanted = self.numbers[(self.numbers >= first) & (self.numbers < first + len(array))]
            self.rows[ending] += [np.array(array[number - first]) for number in wanted]

    def draw(self) -> None:
        """Write the picture and print what it shows.

        Raises:
            UserError: it cannot be written.
        """
        copies = [self.rows[ending] for ending in self.info.files if ending != "labels"]
        pictures = [
            self._decode(stored, int(number))
            for number, *stored_copies in zip(self.numbers, *copies, strict=True)
            for stored in stored_copies
        ]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            _tile(pictures).save(self.file)
        except OSError as error:
            raise UserError(
                f"Got --grid {self.file}, which cannot be written ({error.strerror or error}), expected a place for it."
            ) from error
        labels = self.rows["labels"]
        told = ", ".join(f"{number} (class {label})" for number, label in zip(self.numbers, labels, strict=True))
        mirrored = ", each with its mirrored copy" if self.info.flip else ""
        print(f"{self.file}: row by row the samples {told} of {self.split}{mirrored}")

    @torch.no_grad()
    def _decode(self, stored: np.ndarray, number: int) -> np.ndarray:
        z = torch.from_numpy(stored[None]).float()
        if self.info.kind == "moments":
            mean, std = z.chunk(2, dim=1)
            z = mean + std * draws.normal(0, Stream.VAL_MOMENTS, step=0, rows=torch.tensor([number]), shape=mean.shape[1:])
        return to_uint8(self.autoencoder.decode(z))[0].numpy()


def _tile(pictures: list[np.ndarray]) -> Image.Image:
    _, height, width = pictures[0].shape
    columns, rows = min(COLUMNS, len(pictures)), -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), (128, 128, 128))
    for number, picture in enumerate(pictures):
        image = Image.fromarray(picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, -1))
        sheet.paste(image, (GAP + number % COLUMNS * (width + GAP), GAP + number // COLUMNS * (height + GAP)))
    return sheet
