"""The total derivative of the average velocity by forward-mode differentiation: MeanFlow section 4.1, equation 8."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mf_lightning.types import AverageVelocity


def total_derivative(net: AverageVelocity, z_t: Tensor, v_g: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None) -> Tensor:
    """Return ``du/dt = v_g . d_z u + d_t u``: the JVP of u along ``(dz, dr, dt) = (v_g, 0, 1)`` (equation 8).

    No graph is kept: the target carries no gradient. Fused attention has no forward derivative, so inside this call
    ``scaled_dot_product_attention`` uses its math form, whatever the network asks for.

    Args:
        net: average velocity; called once, on these rows only.
        z_t: states, (B, C, H, W).
        v_g: velocity that moves them, (B, C, H, W).
        t: noisier end of the jump, (B,), in the dtype of ``z_t``.
        r: other end, (B,).
        y: labels, (B,), or None.

    Returns:
        (B, C, H, W), detached, in the dtype that the network returns.
    """

    def u_of(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return net(z, t=t, r=r, y=y)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, dudt = torch.func.jvp(u_of, (z_t, t, r), (v_g.to(z_t.dtype), torch.ones_like(t), torch.zeros_like(r)))
    return dudt
