"""The closed-form oracle: everything MeanFlow learns, known exactly for Gaussian data.

For ``x ~ N(0, S^2 I)`` the marginal at t is ``N(0, s(t)^2 I)`` with ``s(t)^2 = (1 - t)^2 S^2 + t^2``, and the flow only
scales: ``z_r = z_t s(r) / s(t)``. Every JVP, sampler and loss is held against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mf_lightning.flow.path import per_row


@dataclass(frozen=True)
class GaussianFlow:
    """Exact average velocity of ``N(0, S^2 I)`` data; call it like a network.

    Args:
        S: standard deviation of the data.
    """

    S: float

    def scale(self, t: Tensor) -> Tensor:
        """Return ``s(t)``, the standard deviation of ``z_t``, (B,)."""
        return torch.sqrt((1 - t) ** 2 * self.S**2 + t**2)

    def velocity(self, z: Tensor, *, t: Tensor) -> Tensor:
        """Return the marginal velocity ``v(z, t) = z (t - (1 - t) S^2) / s(t)^2``, (B, C, H, W)."""
        return z * per_row((t - (1 - t) * self.S**2) / self.scale(t) ** 2, z)

    def transport(self, z_t: Tensor, *, t: Tensor, r: Tensor) -> Tensor:
        """Return the state at r of the flow through ``z_t`` at t: ``z_r = z_t s(r) / s(t)``, (B, C, H, W)."""
        return z_t * per_row(self.scale(r) / self.scale(t), z_t)

    def __call__(self, z_t: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None = None) -> Tensor:
        """Return ``u(z_t, r, t) = z_t (1 - s(r)/s(t)) / (t - r)``, the limit ``v`` at r = t, (B, C, H, W).

        Written as ``z_t (s(t)^2 - s(r)^2) / ((t - r) s(t) (s(t) + s(r)))`` with the quotient of squares expanded, so that
        nothing is divided by t - r and the limit needs no branch.
        """
        s_t, s_r = self.scale(t), self.scale(r)
        slope = (t + r) * (1 + self.S**2) - 2 * self.S**2  # (s(t)^2 - s(r)^2) / (t - r)
        return z_t * per_row(slope / (s_t * (s_t + s_r)), z_t)
