"""Another project's rows => rows of a shard: mean and std, or latents, all finite, in the dtype to store."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mf_lightning.data.foreign.source import Holds
from mf_lightning.types import UserError

LOGVAR_RANGE = (-30.0, 20.0)
"""Where diffusers' and LDM's DiagonalGaussianDistribution clamp log-variances before they make a std of them."""


def to_stored(values: np.ndarray, *, holds: Holds, dtype: np.dtype, name: Callable[[int], str]) -> np.ndarray:
    """Return rows as a shard stores them; without a change of dtype or of meaning they are the same bits.

    Args:
        values: (n, C', h, w).
        holds: what they are.
        dtype: to store.
        name: tells where a row is from, for messages.

    Raises:
        UserError: values that are not finite, before or in ``dtype``, or that cannot be what ``holds`` says.
    """
    _check_finite(values, name, "")
    channels = values.shape[1] // 2
    mean, second = values[:, :channels], values[:, channels:]
    if holds != "latents":
        _check_second_half(second, holds, name)
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        if holds == "mean_logvar":
            stored = np.concatenate([mean.astype(dtype), logvar_to_std(second).astype(dtype)], axis=1)
        else:
            stored = values.astype(dtype, copy=False)
    _check_finite(stored, name, f" as {dtype}, whose range ends at {np.finfo(dtype).max:,.0f}; give --dtype float32")
    return np.ascontiguousarray(stored)


def logvar_to_std(logvar: np.ndarray) -> np.ndarray:  # log-variance => standard deviation
    """Return ``exp(logvar / 2)`` in float32, clamped first as diffusers does."""
    clamped = torch.from_numpy(np.ascontiguousarray(logvar)).float().clamp(*LOGVAR_RANGE)
    return torch.exp(0.5 * clamped).numpy()


def _check_finite(values: np.ndarray, name: Callable[[int], str], where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if len(bad):
        raise UserError(
            f"Got values that are not finite{where} in {name(int(bad[0]))} ({len(bad):,} such rows in this shard), expected "
            "numbers. Encode those images again, or remove them and their labels."
        )


def _check_second_half(second: np.ndarray, holds: Holds, name: Callable[[int], str]) -> None:
    below = np.flatnonzero((second < 0).reshape(len(second), -1).any(axis=1))
    if holds == "mean_std" and len(below):
        raise UserError(
            f"Got a standard deviation below 0 in {name(int(below[0]))} ({len(below):,} of {len(second):,} rows), expected "
            "none: the second half of the channels is no std, and may be a log-variance, as the kind mar holds it. Check KIND."
        )
    if holds == "mean_logvar" and not len(below):
        raise UserError(
            f"Got no log-variance below 0 in {len(second):,} rows from {name(0)} on, expected some, since an encoder is mostly "
            "sure: the second half of the channels may be a std, as the kinds repa and meanflow hold it. Check KIND."
        )
