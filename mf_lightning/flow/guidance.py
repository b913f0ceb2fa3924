"""Classifier-free guidance built into the training target: MeanFlow section 4.2 and appendix, equations 16-21."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mf_lightning.types import UserError


@dataclass(frozen=True)
class Guidance:
    """Guided velocity ``v_g = omega v_t + kappa v_c + (1 - omega - kappa) v_u`` inside the interval, else ``v_t``.

    Sampling then needs no second pass: the network itself has learned the guided field.

    Args:
        omega: weight of the conditional velocity e - x; ``omega = 1, kappa = 0`` is no guidance.
        kappa: weight of the network's own velocity with the label; 0 saves that forward. The effective scale is
            omega / (1 - kappa).
        interval: times t at which guidance acts, closed at both ends, compared in float32.
    """

    omega: float = 1.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not self.omega > 0:
            raise UserError(f"Got omega = {self.omega}, expected a positive number; 1 with kappa = 0 is no guidance.")
        if not 0 <= self.kappa < 1:
            raise UserError(f"Got kappa = {self.kappa}, expected a number in [0, 1): the scale is omega / (1 - kappa).")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"Got guidance interval {self.interval}, expected two times 0 <= start <= end <= 1.")

    @property
    def is_none(self) -> bool:
        """Whether the guided velocity is the conditional one everywhere."""
        return self.omega == 1 and self.kappa == 0

    @property
    def effective_scale(self) -> float:
        """The scale omega' of ordinary classifier-free guidance that this amounts to."""
        return self.omega / (1 - self.kappa)

    @property
    def null_weight(self) -> float:
        """Weight of the unconditional velocity, ``1 - omega - kappa`` (0 saves that forward)."""
        return 1 - self.omega - self.kappa

    def acts_at(self, t: Tensor) -> Tensor:
        """Return (B,) bool: times inside the closed interval; bounds are rounded to float32, as times are."""
        low, high = torch.tensor(self.interval, dtype=torch.float32, device=t.device)
        t = t.to(torch.float32)
        return (t >= low) & (t <= high)

    def velocity(self, v_t: Tensor, *, v_c: Tensor | None, v_u: Tensor | None) -> Tensor:
        """Return ``v_g``, (B, C, H, W); a velocity whose weight is 0 may be None."""
        v_g = self.omega * v_t
        if self.kappa != 0:
            v_g = v_g + self.kappa * v_c
        if self.null_weight != 0:
            v_g = v_g + self.null_weight * v_u
        return v_g
