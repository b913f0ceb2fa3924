"""Parameters and gradients of the official JAX network (Gsunshine/meanflow d70cb55) under our names and layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

LEAVES = {"kernel": "weight", "bias": "bias", "embedding": "weight"}


def torch_name(path: str) -> str:
    """Return our name of a flax path, for example ``net/blocks/layers_0/attn/qkv/_flax_linear/kernel``."""
    *parts, leaf = path.removeprefix("params/").removeprefix("net/").split("/")
    if leaf not in LEAVES:
        raise ValueError(f"Got the flax path '{path}', expected it to end in {', '.join(LEAVES)}. Extend flax_names.py.")
    parts = [re.sub(r"^layers_(\d+)$", r"\1", part) for part in parts if part not in ("_flax_linear", "_flax_embedding")]
    return ".".join([*parts, LEAVES[leaf]])


def torch_layout(path: str, value: Tensor) -> Tensor:
    """Return the array with its axes in our order: linear (in, out) => (out, in), patches (p, p, C, D) => (D, C, p, p)."""
    if not path.endswith("/kernel"):
        return value
    return value.permute(3, 2, 0, 1) if value.dim() == 4 else value.T


def from_flax(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters, or gradients, of the official network as ours have them."""
    return {torch_name(path): torch_layout(path, value) for path, value in arrays.items()}
