"""Which rows of a batch a step of MeanFlow (algorithm 1) pays for, decided on the CPU from the draw before anything runs.

No decision reads a tensor of the device, so the host never waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mf_lightning.flow.guidance import Guidance
from mf_lightning.flow.passes import Passes
from mf_lightning.transfer import to_device


@dataclass
class Draw:
    """All randomness of one batch; times and drops live on the CPU, where rows are sorted without waiting for a GPU."""

    e: Tensor
    """Noise, (B, C, H, W), on the device of the data."""
    t: Tensor
    """Noisier end of the jump, (B,) float32, CPU."""
    r: Tensor
    """Other end, r <= t, (B,) float32, CPU; equal to t on flow-matching rows."""
    dropped: Tensor
    """Whether the row's label is replaced by the null label, (B,) bool, CPU."""

    @property
    def jumps(self) -> Tensor:
        """Rows with r < t, (B,) bool: the ones whose target needs du/dt."""
        return self.r < self.t

    def order(self) -> Tensor | None:
        """Return the order that puts r < t rows last, (B,) int64, CPU; None if they are there already."""
        order = torch.argsort(self.jumps.to(torch.uint8), stable=True)
        return None if bool((order[1:] > order[:-1]).all()) else order

    def sorted_by(self, order: Tensor) -> Draw:
        """Return the draw with its rows in another order."""
        return Draw(self.e[to_device(order, self.e.device)], self.t[order], self.r[order], self.dropped[order])


@dataclass(frozen=True)
class VelocityRows:
    """Rows of the one call without gradient that gives guidance its velocities: first v_u's, then v_c's, then padding."""

    rows: Tensor
    """(N,) int64, CPU: row of the batch that each row of the call repeats."""
    unconditional: int
    """How many of them see the null label."""
    conditional: int
    """How many keep their label."""


def count_jumps(draw: Draw, passes: Passes) -> int:
    """Return how many last rows are differentiated: those with r < t, padded by r = t rows whose tangent is not used."""
    n = len(draw.t)
    return min(n, passes.padded(int(draw.jumps.sum()), n, parts=32))


def velocity_rows(guided: Tensor, apart: Tensor, guidance: Guidance, passes: Passes) -> VelocityRows:
    """Return the rows that guidance must compute.

    Args:
        guided: rows with their label inside the guidance interval, (B,) bool, CPU.
        apart: those of them whose v_c is not the gradient forward's own output, (B,) bool, CPU.
        guidance: a weight of 0 saves its velocity.
        passes: plain passes take exact counts.
    """
    n, nothing = len(guided), torch.zeros(0, dtype=torch.int64)
    rows_u = guided.nonzero()[:, 0] if guidance.null_weight != 0 else nothing
    rows_c = apart.nonzero()[:, 0] if guidance.kappa != 0 else nothing
    count = len(rows_u) + len(rows_c)
    padding = torch.zeros(passes.padded(count, n, parts=8) - count, dtype=torch.int64)
    return VelocityRows(torch.cat([rows_u, rows_c, padding]), len(rows_u), len(rows_c))
