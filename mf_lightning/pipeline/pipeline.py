"""MeanFlowPipeline: noise and classes => pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from mf_lightning.checkpoints.metadata import weights_metadata
from mf_lightning.flow.sampler import AverageSampler, CountedPasses, Sampler, sample
from mf_lightning.pipeline import requests
from mf_lightning.pipeline.autoencoder import open_autoencoder
from mf_lightning.pipeline.loading import CONFIG_FILE, WEIGHTS_FILE, Description, load_checkpoint, load_folder
from mf_lightning.pipeline.requests import Label
from mf_lightning.pixels import to_uint8
from mf_lightning.sheet import labelled_grid, to_picture
from mf_lightning.types import Autoencoder, UserError


class Generated(NamedTuple):
    """Pictures and what they took."""

    pixels: Tensor
    """(N, c, H, W) uint8, on the CPU."""
    nfe: int
    """Network passes of each image, counted."""
    seconds: float
    """Network and decoder, for all of them, after waiting for the device."""


class MeanFlowPipeline:
    """A trained generator: ``pipeline(labels=[3, 7], seed=0)`` returns PIL images.

    Image i of a seed is a function of (seed, i) alone, the one that evaluation and `predict` make too. A CPU computes each by
    itself, so its bytes depend on nothing else; a GPU computes many at a time, and another number of them may round a value in
    some ten thousands the other way.

    Args:
        net: average velocity, with ``y_null`` and ``config``.
        description: what is known of it.
        autoencoder: its decoder; None opens the one that the description names, on first use.
    """

    def __init__(self, net: nn.Module, description: Description, autoencoder: Autoencoder | None = None) -> None:
        self.net = net
        self.description = description
        if autoencoder is not None:
            self.autoencoder = autoencoder

    @classmethod
    def from_checkpoint(
        cls,
        path: str | PathLike,
        *,
        weights: str | float | None = None,
        autoencoder: str | None = None,
        data: str | PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        trust_net: bool = False,
    ) -> MeanFlowPipeline:
        """Return the generator of a checkpoint: a file, or a directory of shards.

        Args:
            path: for example ``runs/quickstart/checkpoints/last.ckpt``.
            weights: "raw", or an average by its decay; None takes the one that the run's evaluation used.
            autoencoder: local directory or hub name; None takes the one that made the latents.
            data: directory of the data set, where the checkpoint does not describe it.
            device: None is a GPU where there is one.
            dtype: of the network.
            trust_net: import a network class of another package, which runs its code.

        Raises:
            UserError: what is wrong or missing.
        """
        net, description = load_checkpoint(
            Path(path),
            weights=None if weights is None else str(weights),
            autoencoder=autoencoder,
            data=None if data is None else str(data),
            trust_net=trust_net,
        )
        return cls(net, description).to(device, dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike,
        *,
        autoencoder: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        trust_net: bool = False,
    ) -> MeanFlowPipeline:
        """Return the generator of a folder that `export` (or :meth:`save_pretrained`) wrote; arguments as above."""
        net, description = load_folder(Path(folder), trust_net=trust_net)
        if autoencoder is not None:
            description = Description(**{**description.__dict__, "autoencoder": autoencoder})
        return cls(net, description).to(device, dtype)

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write ``model.safetensors`` and ``config.json``, which :meth:`from_pretrained` reads."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.net.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE, metadata=weights_metadata(self.description.plain()))
        (folder / CONFIG_FILE).write_text(json.dumps(self.description.plain(), indent=1) + "\n")

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The decoder, opened on first use.

        Raises:
            UserError: it cannot be had, or is not the one that made the latents.
        """
        data = self.description.data
        return open_autoencoder(self.description.autoencoder or data.autoencoder, data)

    @property
    def num_classes(self) -> int:
        """Classes of the network; 0 for one without labels."""
        return self.net.y_null or 0

    @property
    def class_names(self) -> list[str]:
        """Names of the classes."""
        names = self.description.data.class_names
        return list(names) if len(names) == self.num_classes else [str(number) for number in range(self.num_classes)]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return next(self.net.parameters()).dtype

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> MeanFlowPipeline:
        """Move the network; None is a GPU where there is one."""
        self.net.to(device=requests.choose_device(device), dtype=dtype)
        return self

    def __call__(
        self,
        labels: Sequence[Label] | Label | None = None,
        *,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        nfe: int | None = None,
        grid: Sequence[float] | None = None,
        sampler: Sampler | str | None = None,
        batch_size: int = 64,
    ) -> list[Image.Image]:
        """Return pictures.

        Args:
            labels: classes, by number or name, taken in turn; None takes all of them in turn.
            n: number of pictures; None is as many as there are labels or seeds.
            seed: pictures 0, 1, ... of one seed, or the first picture of each of several.
            nfe: network passes for each, in equal jumps; None is 1.
            grid: times of the jumps instead, falling from 1 to 0.
            sampler: how a jump is made, for example "euler" for flow-matching networks; None is MeanFlow's.
            batch_size: pictures at a time on a GPU.

        Raises:
            UserError: a class, seed, number or grid that cannot be.
        """
        noise, y = self.request(labels, n=n, seed=seed)
        grid = requests.choose_grid(nfe, grid)
        return [to_picture(p) for p in self.generate(noise, y, grid=grid, sampler=sampler, batch_size=batch_size).pixels]

    def request(
        self, labels: Sequence[Label] | Label | None = None, *, n: int | None = None, seed: int | Sequence[int] = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Return noise, (N, C, h, w), and labels, (N,) int64 or None: arguments as when called."""
        seeds = requests.check_seeds(seed)
        numbers = None if labels is None else requests.class_numbers(labels, self.class_names, self.num_classes)
        count = requests.check_count(max(len(numbers or [0]), len(seeds)) if n is None else n)
        noise = self.noise(seeds, count)
        if self.num_classes == 0:
            return noise, None
        turn = torch.tensor(range(self.num_classes) if numbers is None else numbers)
        return noise, turn[torch.arange(count) % len(turn)].to(self.device)

    def noise(self, seeds: int | Sequence[int], count: int = 1) -> Tensor:
        """Return noise, (count, C, h, w): of pictures 0, 1, ... of one seed, or of the first one of each of several."""
        shape = self.description.data.latent_shape
        return requests.noise_of(requests.check_seeds(seeds), count, shape, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def generate(
        self,
        noise: Tensor,
        y: Tensor | None,
        *,
        grid: Sequence[float] = (1.0, 0.0),
        sampler: Sampler | str | None = None,
        batch_size: int = 64,
    ) -> Generated:
        """Return pictures of noise, (N, C, h, w), and labels: (N,) int64, or (N, num_classes + 1) weights between classes."""
        if batch_size < 1:
            raise UserError(f"Got batch_size = {batch_size}, expected at least 1.")
        sampler = requests.choose_sampler(sampler)
        self._check_sampler(sampler)
        size = self._at_once(batch_size)
        noise = noise.to(self.device, self.dtype)
        counted, parts = CountedPasses(self.net), []
        start = self._now()
        for first in range(0, len(noise), size):
            rows = slice(first, first + size)
            part_y = None if y is None else y[rows].to(self.device)
            latents = sample(counted, noise[rows], y=part_y, grid=grid, sampler=sampler)
            parts.append(self.decode(latents))
        return Generated(torch.cat(parts), counted.passes // len(parts), self._now() - start)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 pictures, (N, c, H, W) on the CPU, of scaled latents, (N, C, h, w)."""
        data = self.description.data
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return to_uint8(self.autoencoder.to(latents.device).decode(latents / data.scale + data.shift)).cpu()

    def _at_once(self, batch_size: int) -> int:
        return 1 if self.device.type == "cpu" else batch_size

    def _check_sampler(self, sampler: Sampler) -> None:
        if self.description.flow_matching and isinstance(sampler, AverageSampler):
            raise UserError(
                "Got a flow-matching network to sample with MeanFlow's jumps, expected EulerSampler: how to jump it was never "
                "taught. Give --sampler=euler with a larger nfe (sampler='euler' in Python)."
            )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def compare(
        self,
        labels: Sequence[Label] | Label | None = None,
        *,
        nfe: Sequence[int] = (1, 2, 4),
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        sampler: Sampler | str | None = None,
        scale: int = 1,
    ) -> Image.Image:
        """Return a sheet that compares numbers of passes: a column is one noise and class, a row is an NFE.

        Args:
            nfe: one row each.
            scale: each pixel is drawn at least this many pixels wide.
            labels, n, seed, sampler: as when called.
        """
        noise, y = self.request(labels, n=n, seed=seed)
        if not nfe:
            raise UserError("Got nfe = [], expected at least one number of passes, for example 1, 2, 4.")
        grids = [requests.choose_grid(steps, None) for steps in nfe]
        made = [self.generate(noise, y, grid=grid, sampler=sampler) for grid in grids]
        names = [""] * len(noise) if y is None else [self.class_names[label] for label in y.tolist()]
        return labelled_grid({f"NFE {one.nfe}": one.pixels for one in made}, names, scale=scale)

    def interpolate(
        self,
        *,
        seeds: int | Sequence[int] = 0,
        labels: Sequence[Label] | Label | None = None,
        n: int = 9,
        nfe: int | None = None,
        grid: Sequence[float] | None = None,
        sampler: Sampler | str | None = None,
    ) -> list[Image.Image]:
        """Return pictures on the way from one noise to another, from one class to another, or both.

        Args:
            seeds: one, whose first noise stays, or two.
            labels: one class that stays, or two; None is class 0.
            n: pictures, both ends among them.
            nfe, grid, sampler: as when called.
        """
        weight = torch.linspace(0, 1, requests.check_count(n), dtype=torch.float64)
        noise, y = self.between(weight, seeds=seeds, labels=labels, moving=True)
        grid = requests.choose_grid(nfe, grid)
        return [to_picture(pixels) for pixels in self.generate(noise, y, grid=grid, sampler=sampler).pixels]

    def between(
        self,
        weight: Tensor,
        *,
        seeds: int | Sequence[int] = 0,
        labels: Sequence[Label] | Label | None = None,
        moving: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return noise, (N, C, h, w), and labels, (N,) int64, or weights, (N, num_classes + 1), on the way between two.

        Args:
            weight: where on the way, (N,) in [0, 1].
            seeds, labels: as for :meth:`interpolate`.
            moving: refuse a way that ends where it began.
        """
        ends, numbers = requests.way_ends(seeds, labels, self.class_names, self.num_classes)
        if moving:
            requests.check_moves(ends, numbers)
        noise = requests.between_noises(self.noise(ends[0]), self.noise(ends[-1]), weight)
        if not numbers:
            return noise, None
        mixed = requests.between_classes(numbers[0], numbers[-1], weight, self.num_classes + 1, dtype=self.dtype)
        return noise, mixed.to(self.device)
