"""Inception Score from sums: which split an image falls in is known from its number, so no logits have to be kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mf_lightning.metrics.processes import summed

SPLITS = 10
RNG_SEED = 2020
"""torch-fidelity's defaults."""


class ScoreSums:
    """Sums of class probabilities and negative entropies in each of ten shuffled splits (torch-fidelity, ``metric_isc``).

    Args:
        count: images of all processes.
        classes: K.
    """

    def __init__(self, count: int, classes: int) -> None:
        self.count = count
        order = np.random.RandomState(RNG_SEED).permutation(count)
        bounds = [i * count // SPLITS for i in range(SPLITS + 1)]
        split_of = np.empty(count, np.int64)
        for split in range(SPLITS):
            split_of[order[bounds[split] : bounds[split + 1]]] = split
        self.split_of = torch.from_numpy(split_of)
        self.sizes = torch.tensor([bounds[i + 1] - bounds[i] for i in range(SPLITS)], dtype=torch.float64)
        self.probabilities = torch.zeros(SPLITS, classes, dtype=torch.float64)
        self.entropies = torch.zeros(SPLITS, dtype=torch.float64)

    def update(self, index: Tensor, logits: Tensor) -> None:
        """Add logits, (B, K), of images of these numbers, (B,)."""
        rows = logits.detach().to("cpu", torch.float64)
        p, log_p = rows.softmax(dim=1), rows.log_softmax(dim=1)
        split = self.split_of[index]
        self.probabilities.index_add_(0, split, p)
        self.entropies.index_add_(0, split, (p * log_p).sum(dim=1))

    def compute(self) -> tuple[float, float]:
        """Return mean and standard deviation over the splits of all processes; every process calls it.

        The divergence of a split's images from their mean q is mean(sum p log p) - sum q log q.
        """
        q = summed(self.probabilities) / self.sizes[:, None]
        divergence = summed(self.entropies) / self.sizes - torch.xlogy(q, q).sum(dim=1)
        scores = divergence.exp().numpy()
        return float(scores.mean()), float(scores.std())
