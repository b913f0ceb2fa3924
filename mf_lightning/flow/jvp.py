"""The total derivative of the average velocity by forward-mode differentiation: MeanFlow section 4.1, equation 8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mf_lightning.types import AverageVelocity, UserError

JVPMethod = Literal["network", "torch"]
"""Who differentiates: the network's own tangents, or ``torch.func.jvp``."""

JVPPrecision = Literal["32-true", "bf16-mixed"]


def total_derivative(net: AverageVelocity, z_t: Tensor, v_g: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None) -> Tensor:
    """Return ``du/dt = v_g . d_z u + d_t u``: the JVP of u along ``(dz, dr, dt) = (v_g, 0, 1)`` (equation 8).

    By ``torch.func.jvp``, for any network; the reference that a network's own tangents are held against. No graph is kept:
    the target carries no gradient. Fused attention has no forward derivative, so inside this call
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

    # copies: the compiler asserts where a value, perhaps a slice, lies in memory otherwise than its tangent
    z_t, v_g, t, r = (value.clone(memory_format=torch.contiguous_format) for value in (z_t, v_g.to(z_t.dtype), t, r))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, dudt = torch.func.jvp(u_of, (z_t, t, r), (v_g, torch.ones_like(t), torch.zeros_like(r)))
    return dudt


def choose_jvp(method: JVPMethod | None, net: AverageVelocity) -> JVPMethod:
    """Return who differentiates; None is the network itself where it can, else ``torch.func.jvp``.

    Raises:
        UserError: "network" asked of one that has no tangents of its own.
    """
    has_own = bool(getattr(net, "own_tangents", False))
    if method == "network" and not has_own:
        raise UserError(
            f"Got model.loss.init_args.jvp = network for {type(net).__name__}, expected a network with own_tangents (its call "
            "takes v_g, as SiT's does). Set it to torch: torch.func.jvp differentiates any network."
        )
    return method or ("network" if has_own else "torch")


@contextmanager
def jvp_precision(precision: JVPPrecision | None, z_t: Tensor) -> Iterator[None]:
    """Run a pass in its own precision; None is the precision around it.

    Raises:
        UserError: "32-true" or "bf16-mixed" asked for states that are not float32.
    """
    if precision is None:
        yield
        return
    if z_t.dtype != torch.float32:
        raise UserError(
            f"Got model.loss.init_args.jvp_precision = {precision} for data in {z_t.dtype}, expected float32 data and weights. "
            "Set it to null, or trainer.precision to 32-true or bf16-mixed."
        )
    if precision == "32-true":
        with torch.autocast(z_t.device.type, enabled=False):
            yield
    else:
        with torch.autocast(z_t.device.type, dtype=torch.bfloat16):
            yield
