"""`stats`: mean and standard deviation of each channel of a data set's latents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mf_lightning.data.shards import DatasetInfo, open_split, read_info
from mf_lightning.tools.verify import blocks
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


def stats(path: str | Path, split: str = "train", json: bool = False) -> None:
    """Print mean and standard deviation of each channel of the unscaled latents, and what scale and shift would make them unit.

    Moments are not sampled: the variance of a draw is E[std^2] + Var[mean]. Mirrored copies count as samples.

    Args:
        path: the data set's directory.
        split: which rows.
        json: also print one flat JSON object as the last line: samples, mean and std over all channels, mean_0, std_0, ...

    Raises:
        UserError: an unknown split, an empty or damaged one.
    """
    info = read_info(path)
    moments = latent_moments(path, info, split)
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


def latent_moments(path: str | Path, info: DatasetInfo, split: str) -> Moments:
    """Return mean and spread of each channel of a split's sampled latents, block by block."""
    channels = info.latent_shape[0]
    total = Moments(0, np.zeros(channels), np.zeros(channels))
    for shard in tqdm(open_split(path, info, split), desc=f"Reading {split}", unit="shard", disable=None, leave=False):
        for array in filter(lambda copy: copy is not None, (shard.latents, shard.latents_flip)):
            for _, block in blocks(array):
                mean = block[:, :channels].astype(np.float64)
                count, axes = mean.size // channels, (0, 2, 3)
                center = mean.mean(axis=axes)
                squares = ((mean - center[:, None, None]) ** 2).sum(axis=axes)
                if info.kind == "moments":
                    squares += (block[:, channels:].astype(np.float64) ** 2).sum(axis=axes)
                total.add(count, center, squares)
    if not total.count:
        raise UserError(f"Got no samples in the split '{split}' of '{path}', expected some. Give another --split.")
    if not np.isfinite([total.mean, total.squares]).all():
        raise UserError(
            f"Got values that are not finite in '{path}', expected numbers. Run `python -m mf_lightning verify {path}`."
        )
    return total


def _flat(samples: int, mean: float, std: float, moments: Moments) -> str:
    body: dict[str, float | int] = {"samples": samples, "channels": len(moments.mean), "mean": mean, "std": std}
    for channel in range(len(moments.mean)):
        body |= {f"mean_{channel}": float(moments.mean[channel]), f"std_{channel}": float(moments.std[channel])}
    return json.dumps(body)
