"""Mean and covariance of features from sums, so that no feature has to be kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mf_lightning.metrics.processes import summed


class FeatureSums:
    """Count, sum and sum of outer products of features in float64, about a fixed point near their mean.

    Sums about zero would lose the digits in which the covariance lies; the point is the mean of the first batch, or given.

    Args:
        dim: number of features.
        centre: the point, (D,); None takes the first batch's mean.
    """

    def __init__(self, dim: int, *, centre: np.ndarray | None = None) -> None:
        self.dim = dim
        self.centre = None if centre is None else torch.from_numpy(np.array(centre, np.float64))
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features, (B, D), on any device; the sums stay on the CPU."""
        rows = features.detach().to("cpu", torch.float64)
        if self.centre is None:
            self.centre = rows.mean(dim=0)
        rows = rows - self.centre
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.outer.addmm_(rows.T, rows)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean, (D,), and covariance with the n - 1 divisor, (D, D), float64."""
        centre = torch.zeros(self.dim, dtype=torch.float64) if self.centre is None else self.centre
        offset = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(offset, offset)) / (self.count - 1)
        return (centre + offset).numpy(), covariance.numpy()

    def over_processes(self) -> FeatureSums:
        """Return the sums over all processes, which must have the same given centre; every process calls it."""
        joined = FeatureSums(self.dim)
        joined.centre = self.centre
        joined.count = int(summed(torch.tensor(self.count)))
        joined.total, joined.outer = summed(self.total), summed(self.outer)
        return joined
