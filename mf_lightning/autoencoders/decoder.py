"""The decoder of diffusers' AutoencoderKL as one graph for any number of pictures."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class KLDecoder(nn.Module):
    """Unscaled latents, (B, C, h, w) => pixels, nominally in [-1, 1], (B, c, H, W).

    Args:
        net: diffusers' autoencoder; its decoder is copied.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        conv = getattr(net, "post_quant_conv", None)
        self.post_quant_conv = nn.Identity() if conv is None else copy.deepcopy(conv)
        self.decoder = copy.deepcopy(net.decoder)
        for parent in list(self.decoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Upsample2D):
                    setattr(parent, name, _Upsample(child))

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


class _Upsample(nn.Module):
    """diffusers' Upsample2D without its branches on the batch size (at 64), at which a graph would be cut in two."""

    def __init__(self, layer: Upsample2D) -> None:
        super().__init__()
        assert layer.norm is None
        assert layer.interpolate
        assert layer.use_conv
        self.conv = layer.conv

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
