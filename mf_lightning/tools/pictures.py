"""uint8 pictures in a row, whatever holds them: image files, a data set of latents, an .npz of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mf_lightning.data.crop import read_picture
from mf_lightning.data.images import ImageSource, Unreadable, open_images
from mf_lightning.data.shards import INFO_FILE, read_info
from mf_lightning.data.threads import made_ahead
from mf_lightning.draws import Stream
from mf_lightning.metrics.image_npz import ImageNpz
from mf_lightning.pipeline.autoencoder import open_autoencoder
from mf_lightning.types import UserError


class Pictures(Protocol):
    """Numbered pictures of one size. Picklable: the first process lists them, the others are told."""

    about: dict[str, Any]
    """What they are, for whoever reads the result."""
    shape: tuple[int, int, int]
    """(c, height, width) of each."""

    def __len__(self) -> int: ...

    def batches(self, first: int, last: int, *, size: int, device: torch.device, workers: int) -> Iterator[Tensor]:
        """Yield pictures [first, last) in order, (B, c, H, W) uint8, ``size`` at a time."""
        ...


def open_pictures(
    source: str, *, split: str | None, autoencoder: str | None, image_size: int | None, follow_links: bool
) -> Pictures:
    """Return the pictures at a path.

    Args:
        source: folder, zip, tars or parquet files of images, a data set of latents, or an .npz with ``arr_0``.
        split: of a data set; None is "train".
        autoencoder: of a data set; None is the one that it names.
        image_size: edge of the square to crop from image files, as ADM does; None takes files that are all of one size.
        follow_links: also take what symbolic links out of a folder point to.

    Raises:
        UserError: nothing of the kind, or options that have no effect on it.
    """
    path = Path(source).expanduser()
    is_latents = (path / INFO_FILE).is_file()
    if not is_latents and (split is not None or autoencoder is not None):
        raise UserError(
            f"Got --split or --autoencoder for '{source}', expected them for a data set of latents only. Leave them out."
        )
    pictures: Pictures
    if is_latents:
        pictures = LatentPictures(path, "train" if split is None else split, autoencoder)
        assert pictures.data, "refuses another autoencoder now"
    elif path.is_file() and path.suffix == ".npz":
        pictures = NpzPictures(path)
    else:
        return FilePictures(open_images(source, labels="none", follow_links=follow_links), source, image_size)
    if image_size is not None and pictures.shape[1:] != (image_size, image_size):
        raise UserError(
            f"Got --image_size={image_size} for '{source}', whose pictures are of {_told(pictures.shape)} pixels, expected no "
            "such option: only image files are cropped. Leave it out."
        )
    return pictures


class FilePictures:
    """Image files, in colour (grey ones repeat their channel), decoded by threads ahead of the device."""

    def __init__(self, source: ImageSource, name: str, image_size: int | None) -> None:
        self.source, self.size = source, image_size
        self.shape = tuple(self._read(0, None).shape)
        crop = "none" if image_size is None else f"{image_size}, as ADM does it"
        self.about = {"source": Path(name).name, "images": source.fingerprint(), "crop": crop}

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, first: int, last: int, *, size: int, device: torch.device, workers: int) -> Iterator[Tensor]:
        """Yield the pictures; those of sources that are read in order are read by this thread and decoded by others."""
        return made_ahead(self._tasks(first, last, size), workers=workers)

    def _tasks(self, first: int, last: int, size: int) -> Iterator[Callable[[], Tensor]]:
        for start in range(first, last, size):
            numbers = range(start, min(start + size, last))
            contents = [None if self.source.any_order else self._content(number) for number in numbers]
            yield partial(self._batch, numbers, contents)

    def _batch(self, numbers: range, contents: list[bytes | None]) -> Tensor:
        pictures = [self._read(number, content) for number, content in zip(numbers, contents, strict=True)]
        for number, picture in zip(numbers, pictures, strict=True):
            if picture.shape != self.shape:
                raise UserError(
                    f"Got the image {self.source.names[number]!r} of {_told(picture.shape)} pixels and "
                    f"{self.source.names[0]!r} of {_told(self.shape)}, expected images of one size. Give --image_size=256 "
                    "to crop them as ADM does."
                )
        return torch.from_numpy(np.stack(pictures))

    def _read(self, number: int, content: bytes | None) -> np.ndarray:
        try:
            content = self._content(number) if content is None else content
            return read_picture(content, size=self.size, channels=3).pixels
        except Unreadable as error:
            raise UserError(
                f"Got the image {self.source.names[number]!r}, which cannot be read ({error}), expected a whole one. Repair or "
                "remove it."
            ) from error

    def _content(self, number: int) -> bytes:
        try:
            return self.source.read(number)
        except OSError as error:
            raise UserError(
                f"Got the image {self.source.names[number]!r}, which the disk or network does not give ({error}), expected to "
                "read it. Give the same command again when it can be read."
            ) from error


class LatentPictures:
    """A split of a data set of latents, decoded; moments are sampled by (seed 0, number)."""

    def __init__(self, path: Path, split: str, autoencoder: str | None) -> None:
        self.path, self.split, self.autoencoder = path, split, autoencoder
        info = read_info(path)
        if split not in info.splits:
            raise UserError(f"Got --split={split}, expected one that '{path}' holds: {', '.join(info.splits)}.")
        self.count = info.count(split)
        self.shape = (3, info.image_size, info.image_size)
        self.about = {"source": f"{path.name}, split {split}, decoded", "autoencoder": info.autoencoder, "latent_seed": 0}

    def __reduce__(self):
        return LatentPictures, (self.path, self.split, self.autoencoder)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def data(self):
        """The data module, opened where it is used.

        Raises:
            UserError: the autoencoder cannot be loaded, or did not make these latents.
        """
        from mf_lightning.data.datamodule import LatentDataModule

        info = read_info(self.path)
        return LatentDataModule(
            str(self.path), open_autoencoder(self.autoencoder or info.autoencoder, info), val_split=self.split
        )

    def batches(self, first: int, last: int, *, size: int, device: torch.device, workers: int) -> Iterator[Tensor]:
        """Yield the decoded pictures."""
        rows = self.data.split(self.split)
        for start in range(first, last, size):
            numbers = np.arange(start, min(start + size, last))
            stored, _ = rows.tensors(numbers)
            latents = self.data.to_latents(stored.to(device), stream=Stream.VAL_MOMENTS, step=0, rows=torch.from_numpy(numbers))
            yield self.data.decode(latents)


class NpzPictures:
    """``arr_0`` of an .npz, as ADM's sample and reference batches hold it."""

    def __init__(self, path: Path) -> None:
        self.images = ImageNpz(path)
        _, height, width, channels = self.images.shape
        self.shape = (channels, height, width)
        self.about = {"source": path.name}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, first: int, last: int, *, size: int, device: torch.device, workers: int) -> Iterator[Tensor]:
        """Yield the images."""
        return self.images.batches(size, first, last)


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _told(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[2]}"
