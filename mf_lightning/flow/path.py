"""The straight path from data (t = 0) to noise (t = 1), MeanFlow section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from mf_lightning.types import UserError


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value``, (B,), shaped (B, 1, ..., 1) to multiply rows of ``like``, in its dtype."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def interpolate(x: Tensor, e: Tensor, *, t: Tensor) -> Tensor:
    """Return the state ``z_t = (1 - t) x + t e``, (B, C, H, W), of data and noise at times (B,)."""
    t = per_row(t, x)
    return (1 - t) * x + t * e


def conditional_velocity(x: Tensor, e: Tensor) -> Tensor:
    """Return the velocity of one path, ``v_t = e - x``, (B, C, H, W)."""
    return e - x


def check_times(t: Tensor, r: Tensor) -> None:
    """Refuse times that are not ``0 <= r <= t <= 1``, (B,) on the CPU (on a GPU this would wait for the device).

    Raises:
        UserError: naming the first row that does not fit.
    """
    bad = ~((r >= 0) & (r <= t) & (t <= 1))  # NaN is bad as well
    if bool(bad.any()):
        row = int(torch.nonzero(bad)[0])
        raise UserError(
            f"Got r = {float(r[row]):.6g}, t = {float(t[row]):.6g} in row {row} ({int(bad.sum())} such rows), expected "
            "0 <= r <= t <= 1 (1 = noise, 0 = data). Check the order of the arguments: both are keyword-only, t is the "
            "noisier end of the jump."
        )
