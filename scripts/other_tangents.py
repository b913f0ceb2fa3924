"""MeanFlow with a derivative along other tangents than (v, 0, 1): wrong on purpose, the paper's ablation (table 1b)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mf_lightning.flow import MeanFlowLoss
from mf_lightning.flow.passes import PLAIN, Passes
from mf_lightning.types import AverageVelocity, LossTerms, UserError


def derivative_along(
    net: AverageVelocity, z_t: Tensor, v_g: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None, dr: float, dt: float
) -> Tensor:
    """Return the JVP of u along ``(dz, dr, dt) = (v_g, dr, dt)``, (B, C, H, W), detached; (v_g, 0, 1) is equation 8."""

    def u_of(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return net(z, t=t, r=r, y=y)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tangents = (v_g.to(z_t.dtype), torch.full_like(t, dt), torch.full_like(r, dr))
        return torch.func.jvp(u_of, (z_t, t, r), tangents)[1]


class OtherTangents(MeanFlowLoss):
    """The MeanFlow loss with the tangents (v, dr, dt). The self-check refuses it, rightly: turn that off.

    Args:
        dr: tangent of r; 0 in the paper's method.
        dt: tangent of t; 1 in the paper's method.
    """

    def __init__(self, dr: float = 0.0, dt: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.jvp not in (None, "torch"):
            raise UserError(f"Got jvp = {self.jvp}, expected null: the network's own tangents are the right ones.")
        self.jvp = "torch"
        self.dr = dr
        self.dt = dt

    def __call__(self, *args: Any, passes: Passes = PLAIN, **kwargs: Any) -> LossTerms:
        """Return the loss of one batch."""
        along = partial(derivative_along, dr=self.dr, dt=self.dt)
        return super().__call__(*args, passes=replace(passes, dudt=along), **kwargs)
