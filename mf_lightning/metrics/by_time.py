"""Which times the network is wrong at: errors averaged over bins of ``t``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BINS = 5
"""Equal parts of [0, 1]; the last holds t = 1."""


class ErrorByTime:
    """Sums of named errors over the rows of one validation, by bin of ``t``.

    Processes add their own rows and ``means`` adds their sums up, so neither batches nor the number of processes matter.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, t: Tensor, counted: Tensor, **errors: Tensor) -> None:
        """Add one batch.

        Args:
            t: end of each row's jump, (B,), on the CPU.
            counted: false for rows that fill a batch up, (B,) bool, on the CPU.
            errors: each row's error, (B,), on any device.
        """
        number = (t.double() * BINS).long().clamp(0, BINS - 1)
        mine = (number == torch.arange(BINS)[:, None]) & counted  # (BINS, B)
        self.counts += mine.sum(dim=1)
        for name, error in errors.items():
            kept = torch.where(mine.to(error.device), error.detach().double(), 0.0).sum(dim=1)
            self.sums[name] = self.sums[name] + kept if name in self.sums else kept

    def means(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the mean error of each bin that has rows, by ``raw_error_t0.0-0.2``, ...: the same on every process.

        Args:
            add_up: returns the sum of a tensor over all processes; called equally often on each.
        """
        counts = add_up(self.counts.to(next(iter(self.sums.values())).device)).cpu() if self.sums else self.counts
        found = {}
        for name, values in self.sums.items():
            total = add_up(values)
            for number in range(BINS):
                if counts[number] > 0:
                    found[f"{name}_t{number / BINS:.1f}-{(number + 1) / BINS:.1f}"] = total[number] / counts[number]
        return found
