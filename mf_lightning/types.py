"""Protocols and small records that every floor may use (floor 1: imports nothing of the project)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class UserError(ValueError):
    """Something the user can put right; the message says what was got, what was expected and what to do.

    The commands print it without a trace. Everything else that fails is our fault and shows one.
    """


class AverageVelocity(Protocol):
    """A network ``u(z_t, r, t | y)``: the average velocity of the flow between ``r`` and ``t``.

    Networks that a ``MeanFlowModule`` trains also have ``y_null``, the null label (None if unconditional), and ``config``,
    their settings as plain values.

    A network with ``own_tangents = True`` also takes ``v_g``, (J, C, H, W), and then returns the pair of ``u`` and ``du/dt``
    of its LAST J rows along (dz, dr, dt) = (v_g, 0, 1), detached; the loss then needs no pass of its own for the derivative.
    """

    def __call__(self, z_t: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None) -> Tensor:
        """Return ``u``, (B, C, H, W), of states ``z_t``, (B, C, H, W), times and labels, (B,)."""
        ...


class Autoencoder(ABC):
    """The way from pictures to what the network sees and back. Weights are read on first use, not when configured."""

    @property
    @abstractmethod
    def id(self) -> str:
        """Name of the autoencoder and checksum of its weights; stored in every data set that it made."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Factor that makes latents of unit size: the network sees ``(z - shift) * scale``."""

    @property
    @abstractmethod
    def shift(self) -> float:
        """Mean of the latents before scaling."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Return moments (mean and std stacked, (B, 2C, h, w)), or latents, of pixels in [-1, 1], (B, c, H, W)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels in [-1, 1] (not clipped), (B, c, H, W), of unscaled latents, (B, C, h, w)."""

    def decoder(self) -> nn.Module:
        """Return a copy of the plain decoder as a module: unscaled latents => pixels, for any number of them, to be exported.

        Raises:
            UserError: there is none.
        """
        raise UserError(
            f"Got the autoencoder {self.id}, expected one that gives its decoder as a module. Add `decoder` to its class, or "
            "export with --to safetensors."
        )

    @abstractmethod
    def to(self, device: torch.device) -> Autoencoder:
        """Move the weights and return the autoencoder."""


class LatentBatch(NamedTuple):
    """One batch as the loader gives it (stored values, not yet sampled) and as it reaches the module (``x`` sampled)."""

    x: Tensor
    """Latents, (B, C, h, w) float; before the device transfer the stored array, moments as (B, 2C, h, w)."""
    y: Tensor
    """Labels, (B,) int64."""
    index: Tensor
    """Number of the sample within its split, (B,) int64."""
    row: Tensor
    """Row of the global batch of this optimizer step, (B,) int64, on the CPU: it decides the row's draws. -1 fills a
    batch up in evaluation and counts for nothing."""


@dataclass(frozen=True)
class LatentSpec:
    """What a data set tells the network: shape of one latent, number of classes."""

    shape: tuple[int, int, int]
    """(C, h, w) of one sampled latent."""
    num_classes: int
    """0 for a data set without labels."""


@dataclass
class LossTerms:
    """What one call of the loss returns. Per-row values are detached, only ``loss`` carries a graph."""

    loss: Tensor
    """Scalar: mean over the batch of the weighted error. At ``norm_p = 1`` it is about 1 whatever the network does."""
    raw_error: Tensor
    """(B,) ``||u - u_tgt||^2`` summed over pixels, before the adaptive weight."""
    velocity_error: Tensor
    """(B,) ``||u - v_t||^2`` summed over pixels."""
    dudt: Tensor
    """(B, C, H, W) total derivative; 0 on r = t rows, where it is not needed."""
    dudt_norm: Tensor
    """(B,) its L2 norm over pixels."""
    u: Tensor
    """(B, C, H, W) network output, detached."""
    u_tgt: Tensor
    """(B, C, H, W) regression target."""
    v_g: Tensor
    """(B, C, H, W) guided velocity."""

    def with_rows(self, order: Tensor) -> LossTerms:
        """Return the terms with their rows in another order, (B,) int64; the loss is that of all rows and stays."""
        rows = {f.name: getattr(self, f.name)[order] for f in fields(self) if f.name != "loss"}
        return LossTerms(loss=self.loss, **rows)
