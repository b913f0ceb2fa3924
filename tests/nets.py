"""Small networks with random non-zero weights: a fresh adaLN-zero network has u = 0 and dudt = 0 and proves nothing."""

from __future__ import annotations

import torch
from torch import nn

from mf_lightning.nets import SiT
from mf_lightning.types import LatentSpec

SHAPE = (3, 8, 8)


def randomise(net: nn.Module, *, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Replace every parameter by normal noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return net


def tiny_sit(*, num_classes: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0, std: float = 0.1, **kwargs) -> SiT:
    """Return a SiT of two blocks on (3, 8, 8) latents."""
    settings = {"patch_size": 4, "depth": 2, "hidden_size": 16, "num_heads": 2, **kwargs}
    return randomise(SiT(LatentSpec(SHAPE, num_classes), **settings).to(dtype), seed=seed, std=std)


def along(tangent: tuple[int, int, int]):
    """Return a stand-in for ``MeanFlowLoss._u_and_derivative`` that differentiates along (dz v_g, dr, dt)."""
    dz, dr, dt = tangent

    def u_and_derivative(loss, net, z_t, v_jump, t, r, y, jumps, passes):
        one, y_jump = torch.ones_like(t[jumps]), None if y is None else y[jumps]
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, dudt = torch.func.jvp(
                lambda z, t, r: net(z, t=t, r=r, y=y_jump),
                (z_t[jumps], t[jumps], r[jumps]),
                (dz * v_jump, dt * one, dr * one),
            )
        return net(z_t, t=t, r=r, y=y), dudt

    return u_and_derivative
