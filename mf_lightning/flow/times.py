"""Which times (t, r) a training row sees: MeanFlow section 4.3 and table 1d.

A sampler turns uniform draws into times; where the draws come from is not its business. Times are rounded to float32, so
that runs in float64 see the same times.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mf_lightning.types import UserError


class TimeSampler(ABC):
    """Two independent uniform draws per row => times."""

    @abstractmethod
    def __call__(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``t`` and ``r``, each (B,) float32 with r <= t, of (B, 2) draws in (0, 1)."""


def _sorted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.float(), b.float()
    return torch.maximum(a, b), torch.minimum(a, b)


def _logit_normal(uniform: Tensor, P_mean: float, P_std: float) -> Tensor:
    return torch.sigmoid(P_mean + P_std * torch.special.ndtri(uniform))


def _check_std(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"Got {name} = {value}, expected a positive number: the spread before the sigmoid.")


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    """Draw t and r from one logit-normal and sort them: ``sigmoid(N(P_mean, P_std^2))``, the paper's choice.

    Args:
        P_mean: mean of the normal BEFORE the sigmoid (-0.4 in the paper for ImageNet, -2 for CIFAR-10).
        P_std: its standard deviation (1.0 for ImageNet, 2 for CIFAR-10).
    """

    P_mean: float = -0.4
    P_std: float = 1.0

    def __post_init__(self) -> None:
        _check_std("P_std", self.P_std)

    def __call__(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        times = _logit_normal(uniform, self.P_mean, self.P_std)
        return _sorted(times[:, 0], times[:, 1])


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Draw t and r uniformly from (0, 1) and sort them."""

    def __call__(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        return _sorted(uniform[:, 0], uniform[:, 1])


@dataclass(frozen=True)
class TwoLogitNormals(TimeSampler):
    """Draw t and r from a logit-normal each, then sort them (the official CIFAR-10 recipe, py-meanflow 1f6d72d).

    Args:
        t_P_mean: mean of t's normal before the sigmoid.
        t_P_std: its standard deviation.
        r_P_mean: mean of r's normal before the sigmoid.
        r_P_std: its standard deviation.
    """

    t_P_mean: float = -0.6
    t_P_std: float = 1.6
    r_P_mean: float = -4.0
    r_P_std: float = 1.6

    def __post_init__(self) -> None:
        _check_std("t_P_std", self.t_P_std)
        _check_std("r_P_std", self.r_P_std)

    def __call__(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        first = _logit_normal(uniform[:, 0], self.t_P_mean, self.t_P_std)
        second = _logit_normal(uniform[:, 1], self.r_P_mean, self.r_P_std)
        return _sorted(first, second)


def fm_count(batch_size: int, fm_fraction: float) -> int:
    """Return how many rows of a global batch have r = t: ``floor(batch_size * fm_fraction)``, as the official code.

    A product within 1e-9 of the next whole number counts as that number (0.29 * 100 is 28.999...96 in floating point).
    """
    if not 0 <= fm_fraction <= 1:
        raise UserError(f"Got fm_fraction = {fm_fraction}, expected a share in [0, 1]; 1 is plain flow matching.")
    return math.floor(batch_size * fm_fraction + 1e-9)
