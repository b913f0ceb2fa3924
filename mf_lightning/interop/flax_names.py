"""Parameters and gradients of the official JAX network (Gsunshine/meanflow d70cb55) under our names and layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mf_lightning.types import UserError

LEAVES = {"kernel": "weight", "bias": "bias", "embedding": "weight"}


def torch_name(path: str) -> str:
    """Return our name of a flax path, for example ``net/blocks/layers_0/attn/qkv/_flax_linear/kernel``."""
    *parts, leaf = path.removeprefix("params/").removeprefix("net/").split("/")
    if leaf not in LEAVES:
        raise UserError(
            f"Got the flax path '{path}', expected one ending in {', '.join(LEAVES)}, as the official MeanFlow has them. "
            "Import another network's weights by a state dict with this project's names."
        )
    kept = [re.sub(r"^layers_(\d+)$", r"\1", part) for part in parts if not part.startswith("_flax_")]
    return ".".join([*kept, LEAVES[leaf]])


def torch_layout(path: str, value: Tensor) -> Tensor:
    """Return the array in our order of axes: linear (in, out) => (out, in), patches (p, p, C, D) => (D, C, p, p)."""
    if not path.endswith("/kernel"):
        return value
    if value.dim() not in (2, 4):
        raise UserError(
            f"Got '{path}' of shape {tuple(value.shape)}, expected a kernel of 2 dimensions (linear) or 4 (patches), as the "
            "official MeanFlow has them. Import another network's weights by a state dict with this project's names."
        )
    return value.permute(3, 2, 0, 1) if value.dim() == 4 else value.T


def from_flax(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters, or gradients, of the official network as ours have them."""
    return {torch_name(path): torch_layout(path, value) for path, value in arrays.items()}
