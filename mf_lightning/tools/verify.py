"""`verify`: read a data set whole, name every file that is damaged, and show a few decoded samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mf_lightning.data.shards import DatasetInfo, check_labels
from mf_lightning.tools.reading import DataFiles, File, blocks
from mf_lightning.tools.verify_grid import Grid
from mf_lightning.types import UserError


def verify(
    path: str,
    grid: Path | None = None,
    autoencoder: str | None = None,
    storage_options: dict[str, Any] | None = None,
    fetch_retries: int = 5,
    fetch_timeout: float = 60.0,
) -> None:
    """Check every file's checksum, header, size and values, and every label; print a summary and name what is damaged.

    Args:
        path: the data set's directory, or its URL in any protocol of fsspec (s3://, gs://, hf://, https://, file://), whose
            files are fetched one after the other and not kept.
        grid: .png file to write, with decoded samples spread over the first split that has any, each followed by its mirrored
            copy if there is one.
        autoencoder: turns latents into pictures: a local directory or hub name; without it the one that the data set names.
        storage_options: of the URL's file system, as fsspec takes them.
        fetch_retries: how often a file is fetched again after a failure.
        fetch_timeout: seconds without progress after which a connection is given up.

    Raises:
        UserError: damaged files, after all of them have been named.
    """
    if autoencoder is not None and grid is None:
        raise UserError(
            f"Got --autoencoder {autoencoder} without --grid, expected both: it makes the pictures. Add --grid OUT.png."
        )
    files = DataFiles(path, storage_options, retries=fetch_retries, timeout=fetch_timeout)
    info = files.info
    sheet = None if grid is None else Grid(grid, info, autoencoder)  # what is wrong with it is told before all is read
    print(
        f"{path}: {info.kind} of shape {info.latent_shape}, {info.dtype}{', with mirrored copies' if info.flip else ''}, of "
        f"{info.image_size} pixels, made by {info.autoencoder}; scale {info.scale}, shift {info.shift}"
    )
    damage = [problem for split in info.splits for problem in _check_split(files, split, sheet)]
    for problem in damage:
        print(f"  damaged: {problem}")
    if damage:
        raise UserError(
            f"Got {len(damage):,} damaged file(s) in '{path}', the first: {damage[0]}. Expected none. Copy them once more, or "
            "prepare the data set again."
        )
    if sheet is not None:
        sheet.draw()


def _check_split(files: DataFiles, split: str, sheet: Grid | None) -> list[str]:
    """Print a line of a split and return what is damaged in it."""
    info = files.info
    per_class = np.zeros(max(1, len(info.class_names)), np.int64)
    damage, low, high = [], np.inf, -np.inf
    found, total = files.read(split, info.files, checksums=True), len(info.splits[split]) * len(info.files)
    for file in tqdm(found, desc=f"Verifying {split}", unit="file", total=total, disable=None, leave=False):
        try:
            array = file.coming.result()
            if file.ending == "labels":
                check_labels(array, len(info.class_names), where=file.where)
                per_class += np.bincount(array, minlength=len(per_class))
            else:
                least, most = _check_values(file, array, info)
                low, high = min(low, least), max(high, most)
            if sheet is not None:
                sheet.take(split, file.ending, file.first, array)
        except UserError as error:
            damage.append(str(error))
        except OSError as error:
            damage.append(f"Got '{file.where}', which cannot be read ({error.strerror or error}), expected a whole file.")
    print(
        f"  {split}: {info.count(split):,} samples in {len(info.splits[split])} shard(s), {_classes(info, per_class)}, "
        f"{f'values from {low:.4g} to {high:.4g}' if low <= high else 'no values'}, "
        f"{f'{len(damage)} DAMAGED FILE(S)' if damage else 'checksums good, values all finite'}"
    )
    return damage


def _classes(info: DatasetInfo, per_class: np.ndarray) -> str:
    if not info.class_names:
        return "without classes"
    empty = int((per_class == 0).sum())
    told = f", {empty:,} of {len(per_class):,} classes without a sample" if empty else f" in {len(per_class):,} classes"
    return f"{per_class.min():,} to {per_class.max():,} per class{told}"


def _check_values(file: File, array: np.ndarray, info: DatasetInfo) -> tuple[float, float]:
    """Return the least and the greatest value.

    Raises:
        UserError: a value that is not finite, or a standard deviation below 0.
    """
    low, high = np.inf, -np.inf
    for first, block in blocks(array):
        bad = np.flatnonzero(~np.isfinite(block).reshape(len(block), -1).all(axis=1))
        if len(bad):
            raise UserError(f"Got values that are not finite in '{file.where}', row {first + bad[0]}, expected numbers.")
        if info.kind == "moments":
            below = np.flatnonzero((block[:, info.latent_shape[0] :] < 0).reshape(len(block), -1).any(axis=1))
            if len(below):
                raise UserError(f"Got a standard deviation below 0 in '{file.where}', row {first + below[0]}, expected none.")
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    return low, high
