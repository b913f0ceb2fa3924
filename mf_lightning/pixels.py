"""The one place where model range and uint8 meet."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = "uint8 = floor(clip(127.5 x + 128, 0, 255)): nearest, halves up"
"""Stated in every evaluation protocol: another rule moves FID in the second decimal."""


def from_uint8(images: Tensor) -> Tensor:  # uint8 pixels => model range [-1, 1]
    """Return float32 pixels in [-1, 1] of uint8 images; :func:`to_uint8` gives every value back exactly."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:  # model range [-1, 1] => uint8 pixels
    """Return uint8 pixels of values in [-1, 1], rounded to nearest (halves up) and clipped, as ADM does."""
    return (127.5 * x.to(torch.promote_types(x.dtype, torch.float32)) + 128).clamp(0, 255).to(torch.uint8)
