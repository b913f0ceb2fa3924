"""diffusers' AutoencoderKL (the SD-VAE family) as this project's autoencoder."""

from __future__ import annotations

import copy
import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mf_lightning.assets import asset
from mf_lightning.pixels import to_uint8
from mf_lightning.types import Autoencoder, UserError

SHIPPED = "mf_lightning:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DECODING = ("post_quant_conv", "decoder")
EQUAL_SHARE = 0.999
CHECKED = 8
"""Pictures that a fast decoder is held against the plain one on."""


def _first_cause(error: BaseException) -> str:
    """Return the reason that started a chain of errors, in one line: diffusers calls a hub out of reach a missing file."""
    while (earlier := error.__cause__ or error.__context__) is not None and str(earlier):
        error = earlier
    return " ".join(str(error).split())[:300]


class KLAutoencoder(Autoencoder):
    """A pretrained ``AutoencoderKL`` in diffusers' layout, read on first use.

    Args:
        pretrained: local directory, hub name (``stabilityai/sd-vae-ft-mse``), or ``mf_lightning:digits/autoencoder`` for
            the small one that ships with the package.
        decode_dtype: "bfloat16" decodes in half the memory traffic; encoding stays in float32.
        channels_last: decode with channels innermost, the layout of a GPU's convolution kernels.

    A decoder other than the plain one is held against it on the first pictures that it decodes, and refused where fewer than
    99.9 % of their values are equal as uint8: a score would then be one of the rounding.
    """

    def __init__(
        self, pretrained: str, decode_dtype: Literal["float32", "bfloat16"] = "float32", channels_last: bool = False
    ) -> None:
        if decode_dtype not in DTYPES:
            raise UserError(f"Got decode_dtype = {decode_dtype!r}, expected one of {', '.join(DTYPES)}.")
        self.pretrained = os.path.expanduser(pretrained)
        self.decode_dtype = decode_dtype
        self.channels_last = channels_last
        self.equal_share: float | None = None
        """Share of equal uint8 values on the first pictures; None before, and where nothing is to be compared."""

    @cached_property
    def net(self) -> nn.Module:
        """diffusers' network, in evaluation mode, without gradients.

        Raises:
            UserError: neither a directory nor the hub has it.
        """
        try:
            from diffusers import AutoencoderKL
            from safetensors import SafetensorError
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
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Got the autoencoder {name!r}, which could not be loaded ({_first_cause(error)}), expected a "
                "local folder in diffusers' layout or a hub name that this machine can reach. Without a hub, copy the "
                "folder here and give its path: --autoencoder=/path/to/folder to encode, "
                "--data.init_args.autoencoder.init_args.pretrained=/path/to/folder to train."
            ) from error

    @property
    def scale(self) -> float:
        """``scaling_factor`` of the configuration (0.18215 for SD-VAE)."""
        return float(self.net.config.scaling_factor)

    @property
    def shift(self) -> float:
        """``shift_factor`` of the configuration, 0 where it has none."""
        return float(self.net.config.shift_factor or 0.0)

    @property
    def factor(self) -> int:
        """Pixels per latent position and axis (8 for SD-VAE): images must be a multiple of it."""
        return 2 ** (len(self.net.config.block_out_channels) - 1)

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of pictures, 3 for RGB, and of latents."""
        return self.net.config.in_channels, self.net.config.latent_channels

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
        if self.decode_dtype == "float32" and not self.channels_last:
            return self._plain(latents)
        pixels = self._fast(latents)
        if self.equal_share is None:
            same = to_uint8(pixels[:CHECKED]) == to_uint8(self._plain(latents[:CHECKED]).float())
            self.equal_share = float(same.float().mean())
        if self.equal_share < EQUAL_SHARE:
            option = "channels_last to false" if self.decode_dtype == "float32" else "decode_dtype to float32"
            raise UserError(
                f"Got decode_dtype = {self.decode_dtype}, channels_last = {str(self.channels_last).lower()} for the "
                f"autoencoder {self.pretrained!r}, which give {self.equal_share:.2%} of uint8 values as the plain decoder "
                f"does, expected at least {EQUAL_SHARE:.1%}. Set data.init_args.autoencoder.init_args.{option}."
            )
        return pixels

    def decoder(self) -> nn.Module:
        """Return a copy of the decoder in float32: unscaled latents => pixels."""
        from mf_lightning.autoencoders.decoder import KLDecoder

        return KLDecoder(self.net).float().cpu()

    def _plain(self, latents: Tensor) -> Tensor:
        return self.net.decode(latents.to(self.net.dtype)).sample

    def _fast(self, latents: Tensor) -> Tensor:
        net, layout = self._fast_net, torch.channels_last if self.channels_last else torch.contiguous_format
        with torch.autocast(latents.device.type, enabled=False):
            return net.decode(latents.to(net.dtype, memory_format=layout)).sample.float().contiguous()

    @cached_property
    def _fast_net(self) -> nn.Module:
        """A copy of the decoder in its own precision and layout."""
        net = copy.copy(self.net)
        net._modules = {name: copy.deepcopy(module) for name, module in self.net._modules.items() if name in DECODING}
        for module in net._modules.values():
            layout = torch.channels_last if self.channels_last else torch.preserve_format
            module.to(dtype=DTYPES[self.decode_dtype], memory_format=layout)
        return net

    def to(self, device: torch.device) -> KLAutoencoder:
        """Move the weights and return the autoencoder."""
        if self.net.device != torch.device(device):
            self.net.to(device)
            self.__dict__.pop("_fast_net", None)  # copied anew from where the weights are now, and judged there
            self.equal_share = None
        return self
