"""Randomness without memory: every draw is a function of (seed, stream, step, row).

A counter-based generator (Philox 4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain
torch operations, so that a row's draws do not depend on the batch it sits in, the number of devices, the device, or on
whether the run was interrupted. Key = seed, counter = (block within the row, row, step, stream).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """What a draw is for; two uses of the same (seed, step, row) never share bits."""

    NOISE = 1
    TIMES = 2
    LABEL_DROP = 3
    MOMENTS = 4
    FLIP = 5
    VAL_NOISE = 6
    VAL_TIMES = 7
    VAL_MOMENTS = 8
    SAMPLE_NOISE = 9
    SAMPLE_LABEL = 10
    SYNTHETIC = 11
    SELF_CHECK = 12
    KEPT_FEATURES = 13


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a 32 x 32 bit product (int64 wraps, its bits are those of the true product)."""
    product = word * constant
    return (product >> 32) & _MASK, product & _MASK


def philox_4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Return four words of 32 random bits for each counter (Philox 4x32 with 10 rounds).

    Args:
        counter: four int64 tensors that broadcast against each other, each in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        Four int64 tensors in [0, 2^32), of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def uniform(seed: int, stream: Stream, *, step: int, rows: Tensor, count: int) -> Tensor:
    """Return ``count`` uniform draws for each row, (B, count) float64, strictly inside (0, 1).

    Args:
        seed: of the run, in [0, 2^64).
        stream: what the draw is for.
        step: optimizer step (or 0 where there is none), in [0, 2^32).
        rows: row of the global batch, or number of the sample, (B,) int64 in [0, 2^32); its device is the draw's.
        count: draws per row.
    """
    blocks = torch.arange(-(-count // 4), device=rows.device)[None, :]
    rows = rows.to(torch.int64)[:, None]
    counter = (blocks, rows, torch.full_like(rows, step & _MASK), torch.full_like(rows, int(stream)))
    words = philox_4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]
    return (bits.to(torch.float64) + 0.5) * 2.0**-32


def normal(
    seed: int, stream: Stream, *, step: int, rows: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return standard normal draws, (B, *shape), by Box and Muller's transform in float64, rounded to ``dtype`` last.

    Arguments as in :func:`uniform`; ``shape`` is that of one row.
    """
    count = math.prod(shape)
    half = -(-count // 2)
    u = uniform(seed, stream, step=step, rows=rows, count=2 * half)
    radius, angle = torch.sqrt(-2 * torch.log(u[:, :half])), 2 * math.pi * u[:, half:]
    flat = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]
    return flat.to(dtype).reshape(len(rows), *shape)
