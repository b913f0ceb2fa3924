"""No autoencoder: the network works on pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mf_lightning.types import Autoencoder


class PixelAutoencoder(Autoencoder):
    """Pixels are the latents; for small pictures."""

    id = "pixel"
    scale = 1.0
    shift = 0.0

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the pixels themselves (latents, not moments), (B, c, H, W) in [-1, 1]."""
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """Return the latents themselves, (B, c, H, W), nominally in [-1, 1]."""
        return latents

    def decoder(self) -> nn.Module:
        """Return the identity."""
        return nn.Identity()

    def to(self, device: torch.device) -> PixelAutoencoder:
        """Return the autoencoder: there are no weights to move."""
        return self
