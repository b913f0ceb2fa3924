"""`stats`: mean and standard deviation of each channel of a data set's latents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from mf_lightning.tools.reading import DataFiles, blocks
from mf_lightning.types import UserError


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of each channel, (C,) float64; merged after Chan, Golub and LeVeque (1979)."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    def add(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        """Take in further values of the same channels."""
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + squares + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """Standard deviation, divided by the count."""
        return np.sqrt(self.squares / self.count)


def stats(
    path: str,
    split: str = "train",
    json: bool = False,
    storage_options: dict[str, Any] | None = None,
    fetch_retries: int = 5,
    fetch_timeout: float = 60.0,
) -> None:
    """Print mean and standard deviation of each channel of the unscaled latents, and what scale and shift would make them unit.

    Moments are not sampled: the variance of a draw is E[std^2] + Var[mean]. Mirrored copies count as samples.

    Args:
        path: the data set's directory, or its URL in any protocol of fsspec (s3://, gs://, hf://, https://, file://), whose
            files are fetched one after the other and not kept.
        split: which rows.
        json: also print one flat JSON object as the last line: samples, mean and std over all channels, mean_0, std_0, ...
        storage_options: of the URL's file system, as fsspec takes them.
        fetch_retries: how often a file is fetched again after a failure.
        fetch_timeout: seconds without progress after which a connection is given up.

    Raises:
        UserError: an unknown split, an empty or damaged one.
    """
    files = DataFiles(path, storage_options, retries=fetch_retries, timeout=fetch_timeout)
    info = files.info
    moments = latent_moments(files, split)
    overall_mean = float(moments.mean.mean())
    overall_std = float(np.sqrt((moments.std**2 + (moments.mean - overall_mean) ** 2).mean()))
    copies = " and mirrored copies" if info.flip else ""
    print(f"{path}, {split}: {info.count(split):,} samples{copies}, {info.kind} of shape {info.latent_shape}, unscaled")
    print("channel       mean        std")
    for channel, (mean, std) in enumerate(zip(moments.mean, moments.std, strict=True)):
        print(f"{channel:7d} {mean:10.5f} {std:10.5f}")
    print(f"    all {overall_mean:10.5f} {overall_std:10.5f}")
    inputs = f"mean {(overall_mean - info.shift) * info.scale:.4f}, std {overall_std * abs(info.scale):.4f}"
    print(f"network input at scale {info.scale:g}, shift {info.shift:g}: {inputs}", end="")
    print(f"; unit at scale {1 / overall_std:.5f}, shift {overall_mean:.5f}" if overall_std else "; all values are equal")
    if json:
        print(_flat(info.count(split), overall_mean, overall_std, moments))


def latent_moments(files: DataFiles, split: str) -> Moments:
    """Return mean and spread of each channel of a split's sampled latents, block by block."""
    info, channels = files.info, files.info.latent_shape[0]
    endings = [ending for ending in info.files if ending != "labels"]
    total = Moments(0, np.zeros(channels), np.zeros(channels))
    for file in tqdm(
        files.read(split, endings, checksums=False), desc=f"Reading {split}", unit="file", disable=None, leave=False
    ):
        for _, block in blocks(file.coming.result()):
            mean = block[:, :channels].astype(np.float64)
            count, axes = mean.size // channels, (0, 2, 3)
            center = mean.mean(axis=axes)
            squares = ((mean - center[:, None, None]) ** 2).sum(axis=axes)
            if info.kind == "moments":
                squares += (block[:, channels:].astype(np.float64) ** 2).sum(axis=axes)
            total.add(count, center, squares)
    if not total.count:
        raise UserError(f"Got no samples in the split '{split}' of '{files.path}', expected some. Give another --split.")
    if not np.isfinite([total.mean, total.squares]).all():
        raise UserError(
            f"Got values that are not finite in '{files.path}', expected numbers. Run `python -m mf_lightning verify "
            f"{files.path}`."
        )
    return total


def _flat(samples: int, mean: float, std: float, moments: Moments) -> str:
    body: dict[str, float | int] = {"samples": samples, "channels": len(moments.mean), "mean": mean, "std": std}
    for channel in range(len(moments.mean)):
        body |= {f"mean_{channel}": float(moments.mean[channel]), f"std_{channel}": float(moments.std[channel])}
    return json.dumps(body)
