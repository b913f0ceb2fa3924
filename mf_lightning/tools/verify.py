"""`verify`: read a data set whole, name every file that is damaged, and show a few decoded samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mf_lightning import draws
from mf_lightning.data.checksum import file_checksum
from mf_lightning.data.opened import open_array
from mf_lightning.data.shards import DatasetInfo, ShardInfo, check_labels, open_split, read_info, shard_file
from mf_lightning.draws import Stream
from mf_lightning.pixels import to_uint8
from mf_lightning.types import Autoencoder, UserError

BLOCK = 16 << 20
"""Bytes that are looked at in one step."""
PICTURES, COLUMNS, GAP = 32, 8, 2


def verify(path: str | Path, grid: Path | None = None, autoencoder: str | None = None) -> None:
    """Check every file's checksum, header, size and values, and every label; print a summary and name what is damaged.

    Args:
        path: the data set's directory.
        grid: .png file to write, with decoded samples spread over the first split that has any, each followed by its mirrored
            copy if there is one.
        autoencoder: turns latents into pictures: a local directory or hub name; without it the one that the data set names.

    Raises:
        UserError: damaged files, after all of them have been named.
    """
    info = read_info(path)
    if autoencoder is not None and grid is None:
        raise UserError(
            f"Got --autoencoder {autoencoder} without --grid, expected both: it makes the pictures. Add --grid OUT.png."
        )
    if grid is not None and grid.suffix != ".png":
        raise UserError(f"Got --grid {grid}, expected a name that ends in .png.")
    print(
        f"{path}: {info.kind} of shape {info.latent_shape}, {info.dtype}{', with mirrored copies' if info.flip else ''}, of "
        f"{info.image_size} pixels, made by {info.autoencoder}; scale {info.scale}, shift {info.shift}"
    )
    damage = [problem for split in info.splits for problem in _check_split(path, info, split)]
    for problem in damage:
        print(f"  damaged: {problem}")
    if damage:
        raise UserError(
            f"Got {len(damage):,} damaged file(s) in '{path}', the first: {damage[0]}. Expected none. Copy them once more, or "
            "prepare the data set again."
        )
    if grid is not None:
        _draw_grid(path, info, grid, open_autoencoder(autoencoder or info.autoencoder, info))


def _check_split(path: str | Path, info: DatasetInfo, split: str) -> list[str]:
    """Print a line of a split and return what is damaged in it."""
    per_class = np.zeros(max(1, len(info.class_names)), np.int64)
    damage, low, high = [], np.inf, -np.inf
    for shard in tqdm(info.splits[split], desc=f"Verifying {split}", unit="shard", disable=None, leave=False):
        for ending in info.files:
            file = shard_file(path, split, shard.name, ending)
            try:
                array = _open(file, info, shard, ending)
                if ending == "labels":
                    check_labels(array, len(info.class_names), where=str(file))
                    per_class += np.bincount(array, minlength=len(per_class))
                else:
                    least, most = _check_values(file, array, info)
                    low, high = min(low, least), max(high, most)
            except UserError as error:
                damage.append(str(error))
            except OSError as error:
                damage.append(f"Got '{file}', which cannot be read ({error.strerror or error}), expected a whole file.")
    state = f"{len(damage)} DAMAGED FILE(S)" if damage else "checksums good, values all finite"
    empty = int((per_class == 0).sum())
    print(
        f"  {split}: {info.count(split):,} samples in {len(info.splits[split])} shard(s), {per_class.min():,} to "
        f"{per_class.max():,} per class{f', {empty:,} classes without a sample' if empty else ''}, values from {low:.4g} to "
        f"{high:.4g}, {state}"
    )
    return damage


def _open(file: Path, info: DatasetInfo, shard: ShardInfo, ending: str) -> np.ndarray:
    shape, dtype = ((shard.count,), np.int64) if ending == "labels" else ((shard.count, *info.stored_shape), info.dtype)
    array = open_array(file, shape=shape, dtype=np.dtype(dtype))
    found = file_checksum(file)
    if found != shard.sha256.get(ending):
        raise UserError(
            f"Got checksum {found} of '{file}', expected {shard.sha256.get(ending)}: the file was altered or damaged."
        )
    return array


def _check_values(file: Path, array: np.ndarray, info: DatasetInfo) -> tuple[float, float]:
    """Return the least and the greatest value.

    Raises:
        UserError: a value that is not finite, or a standard deviation below 0.
    """
    low, high = np.inf, -np.inf
    for first, block in blocks(array):
        bad = np.flatnonzero(~np.isfinite(block).reshape(len(block), -1).all(axis=1))
        if len(bad):
            raise UserError(f"Got values that are not finite in '{file}', row {first + bad[0]}, expected numbers.")
        if info.kind == "moments":
            below = np.flatnonzero((block[:, info.latent_shape[0] :] < 0).reshape(len(block), -1).any(axis=1))
            if len(below):
                raise UserError(f"Got a standard deviation below 0 in '{file}', row {first + below[0]}, expected none.")
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    return low, high


def blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a mapped array in pieces of bounded size, each with the number of its first row."""
    rows = max(1, BLOCK // max(1, array[:1].nbytes))
    for first in range(0, len(array), rows):
        yield first, array[first : first + rows]


def open_autoencoder(name: str, info: DatasetInfo) -> Autoencoder:
    """Return the autoencoder of a name or of a data set's id.

    Raises:
        UserError: it is not the one that made the latents.
    """
    from mf_lightning.autoencoders import KLAutoencoder, PixelAutoencoder
    from mf_lightning.data.datamodule import same_autoencoder

    name = name.partition("@")[0] if not Path(name).is_dir() else name
    autoencoder = PixelAutoencoder() if name == "pixel" else KLAutoencoder(name)
    if not same_autoencoder(autoencoder.id, info.autoencoder):
        raise UserError(
            f"Got the autoencoder {autoencoder.id}, expected {info.autoencoder}, which made these latents. Give that one as "
            "--autoencoder, a local directory or hub name."
        )
    return autoencoder


def _draw_grid(path: str | Path, info: DatasetInfo, file: Path, autoencoder: Autoencoder) -> None:
    split = next((name for name in info.splits if info.count(name)), None)
    if split is None:
        raise UserError(f"Got no samples in '{path}', expected some to make pictures of. Leave --grid out.")
    count = info.count(split)
    wanted = np.unique(np.linspace(0, count - 1, min(count, PICTURES // (2 if info.flip else 1))).astype(int))
    shards = open_split(path, info, split)
    starts = np.cumsum([0, *(len(shard.labels) for shard in shards)])
    pictures, labels = [], []
    for number in wanted:
        shard = shards[int(np.searchsorted(starts, number, side="right")) - 1]
        row = number - starts[np.searchsorted(starts, number, side="right") - 1]
        labels.append(int(shard.labels[row]))
        for copy in (shard.latents, shard.latents_flip):
            if copy is not None:
                pictures.append(_decode(torch.from_numpy(np.array(copy[row : row + 1])), info, int(number), autoencoder))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _tile(pictures).save(file)
    except OSError as error:
        raise UserError(
            f"Got --grid {file}, which cannot be written ({error.strerror or error}), expected a place for it."
        ) from error
    told = ", ".join(f"{number} (class {label})" for number, label in zip(wanted, labels, strict=True))
    print(f"{file}: row by row the samples {told} of {split}{', each with its mirrored copy' if info.flip else ''}")


@torch.no_grad()
def _decode(stored: torch.Tensor, info: DatasetInfo, number: int, autoencoder: Autoencoder) -> np.ndarray:
    z = stored.float()
    if info.kind == "moments":
        mean, std = z.chunk(2, dim=1)
        z = mean + std * draws.normal(0, Stream.VAL_MOMENTS, step=0, rows=torch.tensor([number]), shape=mean.shape[1:])
    return to_uint8(autoencoder.decode(z))[0].numpy()


def _tile(pictures: list[np.ndarray]) -> Image.Image:
    _, height, width = pictures[0].shape
    columns, rows = min(COLUMNS, len(pictures)), -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), (128, 128, 128))
    for number, picture in enumerate(pictures):
        image = Image.fromarray(picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, -1))
        sheet.paste(image, (GAP + number % COLUMNS * (width + GAP), GAP + number // COLUMNS * (height + GAP)))
    return sheet
