"""Dual numbers: a value and, for the last rows of a batch, the tangent that rides beside it.

A network written in these functions runs once and gives its output for every row, with a graph if asked for, and the
directional derivative for the rows that need it, without a graph and without a second run of the primal: the tangents take
layer-norm statistics, attention inputs and pre-activations from the rows as they pass.

Where a function's Jacobian is symmetric (elementwise functions, softmax, normalisation), its tangent is what torch's own
backward kernel returns for the tangent in place of the gradient: one fused kernel, no formula to get wrong.

Shapes: B batch, J <= B rows with a tangent, ... anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class Dual(NamedTuple):
    """A value with the tangent of its last rows."""

    x: Tensor
    """(B, ...), may carry a graph."""
    dx: Tensor | None = None
    """(J, ...), never carries one; None without tangents."""

    @property
    def rows(self) -> Tensor:
        """The rows of ``x`` that have a tangent, (J, ...); for use under ``no_grad``."""
        return self.x[len(self.x) - len(self.dx) :]


def same(function, value: Dual) -> Dual:
    """Return a linear map without constant (a reshape, a transpose) of value and tangent."""
    return Dual(function(value.x), None if value.dx is None else function(value.dx))


def linear(layer: nn.Linear, value: Dual) -> Dual:
    """Return ``W x + b`` and ``W dx``."""
    y = layer(value.x)
    if value.dx is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, F.linear(value.dx, layer.weight))


def silu(value: Dual) -> Dual:
    """Return ``x sigmoid(x)``, elementwise."""
    y = F.silu(value.x)
    if value.dx is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, aten.silu_backward(value.dx, value.rows))


def gelu_tanh(value: Dual) -> Dual:
    """Return the Gaussian error linear unit in its tanh form, elementwise."""
    y = F.gelu(value.x, approximate="tanh")
    if value.dx is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, aten.gelu_backward(value.dx, value.rows, approximate="tanh"))


def layer_norm(layer: nn.LayerNorm, value: Dual) -> Dual:
    """Return the last dimension normalised; an affine part scales the tangent."""
    if value.dx is None:
        return Dual(layer(value.x))
    shape = layer.normalized_shape
    y, mean, rstd = torch.native_layer_norm(value.x, shape, layer.weight, layer.bias, layer.eps)
    with torch.no_grad():
        first = len(value.x) - len(value.dx)
        x, dx = value.rows.to(mean.dtype), value.dx.to(mean.dtype)
        only_input = [True, False, False]
        dy = aten.native_layer_norm_backward(dx, x, shape, mean[first:], rstd[first:], None, None, only_input)[0]
        return Dual(y, dy if layer.weight is None else dy * layer.weight)


def modulate(value: Dual, shift: Dual, scale: Dual) -> Dual:
    """Return ``x (1 + scale) + shift`` with one scale and shift for all tokens: (B, T, D), (B, D), (B, D) => (B, T, D)."""
    y = value.x * (1 + scale.x[:, None]) + shift.x[:, None]
    if value.dx is None:
        return Dual(y)
    with torch.no_grad():
        moved = torch.addcmul(shift.dx[:, None], value.rows, scale.dx[:, None])
        return Dual(y, moved.addcmul_(value.dx, 1 + scale.rows[:, None]))


def add_gated(value: Dual, gate: Dual, branch: Dual) -> Dual:
    """Return ``x + gate b`` with one gate for all tokens: (B, T, D), (B, D), (B, T, D) => (B, T, D)."""
    y = value.x + gate.x[:, None] * branch.x
    if value.dx is None:
        return Dual(y)
    with torch.no_grad():
        moved = torch.addcmul(value.dx, gate.rows[:, None], branch.dx)
        return Dual(y, moved.addcmul_(gate.dx[:, None], branch.rows))


def attention_tangent(q: Dual, k: Dual, v: Dual, scale: float) -> Tensor:
    """Return the tangent of ``softmax(scale q k^T) v``, (J, heads, T, d), by plain matrix products.

    With ``P`` the softmax and ``dS = scale (dq k^T + q dk^T)``: ``dP = P (dS - sum(P dS))``, ``do = dP v + P dv``.
    """
    (qj, dq), (kj, dk), (vj, dv) = ((dual.rows.flatten(0, 1), dual.dx.flatten(0, 1)) for dual in (q, k, v))
    q_scaled, dq_scaled = qj * scale, dq * scale
    k_t, dk_t = kj.transpose(1, 2), dk.transpose(1, 2)
    p = torch.softmax(torch.bmm(q_scaled, k_t), dim=-1)
    ds = torch.baddbmm(torch.bmm(dq_scaled, k_t), q_scaled, dk_t)
    dp = aten._softmax_backward_data(ds.to(p.dtype), p, -1, p.dtype)
    do = torch.baddbmm(torch.bmm(p, dv.to(p.dtype)), dp, vj.to(p.dtype))
    return do.unflatten(0, q.dx.shape[:2])
