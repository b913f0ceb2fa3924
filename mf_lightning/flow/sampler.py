"""From noise to data in a few jumps: MeanFlow section 4.2, equation 12 and algorithm 2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from mf_lightning.flow.path import per_row
from mf_lightning.types import AverageVelocity, UserError


def time_grid(num_steps: int) -> list[float]:
    """Return the uniform grid ``1, ..., 1/2, ..., 0`` of ``num_steps`` jumps.

    Raises:
        UserError: ``num_steps`` is not a whole number of at least 1.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise UserError(f"Got num_steps = {num_steps!r}, expected a whole number of at least 1: one jump is one pass.")
    return [1 - i / num_steps for i in range(num_steps)] + [0.0]


def check_nfe(name: str, nfe: list[int]) -> list[int]:
    """Return the numbers of sampling steps of an option, checked at the door.

    Args:
        name: of the option, for messages.
        nfe: numbers of jumps, each one network pass.

    Raises:
        UserError: none, one that is not whole and positive, or one that stands twice.
    """
    if not nfe:
        raise UserError(f"Got {name} = [], expected at least one number of sampling steps, for example [1, 2].")
    for num_steps in nfe:
        time_grid(num_steps)
    if len(set(nfe)) != len(nfe):
        raise UserError(f"Got {name} = {nfe}, expected each number of sampling steps once. Leave out what stands twice.")
    return list(nfe)


def check_grid(grid: Sequence[float]) -> None:
    """Refuse a time grid that does not fall from 1 to 0.

    Raises:
        UserError: saying what the grid must look like.
    """
    falls = all(later < earlier for earlier, later in pairwise(grid))
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not falls:
        raise UserError(f"Got the time grid {list(grid)}, expected times that fall from 1 (noise) to 0 (data).")


def jump(net: AverageVelocity, z_t: Tensor, *, t: float, r: float, y: Tensor | None) -> Tensor:
    """Return ``z_r = z_t - (t - r) u(z_t, r, t)`` (equation 12), (B, C, H, W), one network pass."""
    t_rows, r_rows = (torch.full((z_t.shape[0],), time, dtype=z_t.dtype, device=z_t.device) for time in (t, r))
    return z_t - per_row(t_rows - r_rows, z_t) * net(z_t, t=t_rows, r=r_rows, y=y).to(z_t.dtype)


class Sampler(ABC):
    """How one pass of the network carries states from t to r."""

    name: ClassVar[str]
    """As it stands in an evaluation's protocol."""

    @abstractmethod
    def jump(self, net: AverageVelocity, z_t: Tensor, *, t: float, r: float, y: Tensor | None) -> Tensor:
        """Return ``z_r``, (B, C, H, W), by one network pass."""


@dataclass(frozen=True)
class AverageSampler(Sampler):
    """Jump by the average velocity: ``z_r = z_t - (t - r) u(z_t, r, t)`` (equation 12). One jump is MeanFlow's one step."""

    name: ClassVar[str] = "average velocity"

    def jump(self, net: AverageVelocity, z_t: Tensor, *, t: float, r: float, y: Tensor | None) -> Tensor:
        """Return ``z_r``, (B, C, H, W), by one network pass."""
        return jump(net, z_t, t=t, r=r, y=y)


@dataclass(frozen=True)
class EulerSampler(Sampler):
    """Follow the instantaneous velocity: ``z_r = z_t - (t - r) u(z_t, t, t)``, Euler's method on the flow's ODE.

    A flow-matching network has only ever seen r = t, so this is how it is sampled. Its error falls as one over the number of
    jumps, with a MeanFlow network too, whose ``u(z, t, t)`` is the velocity as well.
    """

    name: ClassVar[str] = "Euler"

    def jump(self, net: AverageVelocity, z_t: Tensor, *, t: float, r: float, y: Tensor | None) -> Tensor:
        """Return ``z_r``, (B, C, H, W), by one network pass at r = t."""
        t_rows, r_rows = (torch.full((z_t.shape[0],), time, dtype=z_t.dtype, device=z_t.device) for time in (t, r))
        return z_t - per_row(t_rows - r_rows, z_t) * net(z_t, t=t_rows, r=t_rows, y=y).to(z_t.dtype)


@torch.no_grad()
def sample(
    net: AverageVelocity, z_1: Tensor, *, y: Tensor | None, grid: Sequence[float], sampler: Sampler = AverageSampler()
) -> Tensor:
    """Return data of noise, by one jump between each two times of the grid (algorithm 2; n jumps are n passes).

    Args:
        net: average velocity.
        z_1: noise, (B, C, H, W).
        y: labels, (B,), or None.
        grid: falling times from 1 to 0, see :func:`time_grid`.
        sampler: how a jump is made.
    """
    check_grid(grid)
    z = z_1
    for t, r in pairwise(grid):
        z = sampler.jump(net, z, t=t, r=r, y=y)
    return z


class CountedPasses:
    """A network that counts its passes, so that NFE is measured, never declared.

    Args:
        net: average velocity to wrap.
    """

    def __init__(self, net: AverageVelocity) -> None:
        self.net = net
        self.passes = 0

    def __call__(self, z_t: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None) -> Tensor:
        """Return the network's output and count one pass (of a batch, so of each of its samples)."""
        self.passes += 1
        return self.net(z_t, t=t, r=r, y=y)
