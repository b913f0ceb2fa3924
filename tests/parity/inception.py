"""An InceptionV3 of torch-fidelity with seeded random weights, so that nothing has to be downloaded."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Unloaded(FeatureExtractorInceptionV3):
    """The extractor as built, before any weights: its state dict gives names, shapes and their order."""

    def load_state_dict(self, *args, **kwargs) -> None:
        """Keep what the constructor made."""


def seeded_inception_weights(seed: int) -> dict[str, Tensor]:
    """Return a state dict of the extractor ``inception-v3-compat``, drawn from one CPU generator in its own order.

    Matrices and kernels are normal with variance 2 / (elements of one output row), running variances 0.5 + uniform,
    batch-norm weights 1 + 0.1 normal, other vectors 0.1 normal.
    """
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    empty = _Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing).state_dict()
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, like: Tensor) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.zeros_like(like)
        if name.endswith("running_var"):
            return 0.5 + torch.rand(like.shape, generator=generator)
        normal = torch.randn(like.shape, generator=generator)
        if like.dim() >= 2:
            return normal * math.sqrt(2 / like[0].numel())
        return 1 + 0.1 * normal if name.endswith("bn.weight") else 0.1 * normal

    return {name: drawn(name, like) for name, like in empty.items()}


def checksum(weights: Mapping[str, Tensor]) -> bytes:
    """Return the SHA-256 of the float32 bytes of all weights in order, counters left out."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        if not name.endswith("num_batches_tracked"):
            digest.update(value.float().contiguous().numpy().tobytes())
    return digest.digest()
