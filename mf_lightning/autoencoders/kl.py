"""diffusers' AutoencoderKL (the SD-VAE family) as this project's autoencoder."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from mf_lightning.assets import asset
from mf_lightning.types import Autoencoder, UserError

SHIPPED = "mf_lightning:"


class KLAutoencoder(Autoencoder):
    """A pretrained ``AutoencoderKL`` in diffusers' layout, read on first use.

    Args:
        pretrained: local directory, hub name (``stabilityai/sd-vae-ft-mse``), or ``mf_lightning:digits/autoencoder`` for
            the small one that ships with the package.
    """

    def __init__(self, pretrained: str) -> None:
        self.pretrained = pretrained

    @cached_property
    def net(self) -> nn.Module:
        """diffusers' network, in evaluation mode, without gradients.

        Raises:
            UserError: neither a directory nor the hub has it.
        """
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError("KLAutoencoder needs the package diffusers: pip install diffusers") from error
        name = self.pretrained
        source = str(asset(name.removeprefix(SHIPPED))) if name.startswith(SHIPPED) else name
        if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
            raise UserError(
                f"Got the autoencoder {name!r}, which is no directory here, expected a folder in diffusers' layout "
                "(config.json, diffusion_pytorch_model.safetensors) or a hub name such as stabilityai/sd-vae-ft-mse."
            )
        try:
            return AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False).eval().requires_grad_(False)
        except OSError as error:
            raise UserError(
                f"Got the autoencoder {name!r}, which could not be loaded ({str(error).splitlines()[0]}), expected a "
                "local folder in diffusers' layout or a hub name that this machine can reach. Without a hub, copy the "
                "folder here and give its path."
            ) from error

    @property
    def scale(self) -> float:
        """``scaling_factor`` of the configuration (0.18215 for SD-VAE)."""
        return float(self.net.config.scaling_factor)

    @property
    def shift(self) -> float:
        """``shift_factor`` of the configuration, 0 where it has none."""
        return float(self.net.config.shift_factor or 0.0)

    @cached_property
    def id(self) -> str:
        """Folder or hub name and the first 16 digits of the SHA-256 over names and values of all weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.net.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.contiguous().cpu().numpy().tobytes())
        folder = Path(self.pretrained)
        return f"{folder.name if folder.is_dir() else self.pretrained}@{digest.hexdigest()[:16]}"

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return moments, mean and std stacked, (B, 2C, h, w), unscaled, of pixels in [-1, 1], (B, c, H, W)."""
        posterior = self.net.encode(pixels.to(self.net.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels, nominally in [-1, 1], (B, c, H, W), of unscaled latents, (B, C, h, w)."""
        return self.net.decode(latents.to(self.net.dtype)).sample

    def to(self, device: torch.device) -> KLAutoencoder:
        """Move the weights and return the autoencoder."""
        self.net.to(device)
        return self
