"""Label drop: which rows see the null label, so that the network also learns the unconditional velocity.

The choice depends on the draws of the WHOLE global batch, (N,), so it keeps its meaning on any number of devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mf_lightning.types import UserError


class LabelDrop(ABC):
    """One uniform draw per row of the global batch => which rows lose their label."""

    @abstractmethod
    def __call__(self, uniform: Tensor) -> Tensor:
        """Return (N,) bool: True where the label is dropped."""


def _check_probability(value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"Got a label drop probability of {value}, expected a number in [0, 1); 0 turns it off.")


@dataclass(frozen=True)
class DropFirstRows(LabelDrop):
    """Drop the first rows, as many as draws fall below the probability (Gsunshine/meanflow d70cb55; the default).

    The first rows are r = t rows, so dropped labels reach r != t rows only where the count exceeds their number.

    Args:
        probability: expected share of rows without label (0.1 in the paper).
    """

    probability: float = 0.1

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    def __call__(self, uniform: Tensor) -> Tensor:
        count = (uniform < self.probability).sum()
        return torch.arange(len(uniform), device=uniform.device) < count


@dataclass(frozen=True)
class DropAnyRow(LabelDrop):
    """Drop each row's label by its own draw, r != t rows as well.

    Args:
        probability: of each row.
    """

    probability: float = 0.1

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    def __call__(self, uniform: Tensor) -> Tensor:
        return uniform < self.probability
