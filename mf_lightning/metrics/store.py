"""Features that a figure needs one by one: on disk, read in blocks, spread over processes by the number of their image."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mf_lightning.metrics.processes import sent_from, summed, world

BLOCK = 1000
"""Rows that are in memory at a time."""


class FeatureStore:
    """Features of images 0, 1, ..., of which image i lies with process i mod world size, in a file without a name.

    Args:
        count: images of all processes.
        dim: features of each.
    """

    def __init__(self, count: int, dim: int) -> None:
        self.count, self.dim = count, dim
        self.rank, self.processes = world()
        self.mine = len(range(self.rank, count, self.processes))
        self._row = dim * 4
        self._file = tempfile.TemporaryFile(prefix="features-")  # noqa: SIM115 - gone with this object
        self._written = np.zeros(self.mine, bool)

    def add(self, index: Tensor, features: Tensor) -> None:
        """Keep features, (B, D), of this process's images of these numbers, (B,)."""
        rows = features.detach().to("cpu", torch.float32).contiguous().numpy()
        for number, row in zip(index.tolist(), rows, strict=True):
            place, owner = divmod(number, self.processes)
            assert owner == self.rank, "each process keeps its own images"
            data, start = row.tobytes(), place * self._row
            while data:  # a full disk takes a part, and says so the next time
                written = os.pwrite(self._file.fileno(), data, start)
                data, start = data[written:], start + written
            self._written[place] = True

    def local(self, places: np.ndarray) -> Tensor:
        """Return this process's rows at places, (B, D): place p is image ``p * world size + rank``."""
        rows = np.empty((len(places), self.dim), np.float32)
        for out, place in enumerate(places.tolist()):
            rows[out] = np.frombuffer(os.pread(self._file.fileno(), self._row, place * self._row), np.float32)
        return torch.from_numpy(rows)

    def local_blocks(self) -> Iterator[Tensor]:
        """Yield this process's rows in order, in blocks."""
        assert self._written.all(), "every image was added"
        for start in range(0, self.mine, BLOCK):
            size = min(BLOCK, self.mine - start)
            data = os.pread(self._file.fileno(), size * self._row, start * self._row)
            yield torch.from_numpy(np.frombuffer(data, np.float32).reshape(size, self.dim).copy())

    def blocks(self) -> Iterator[Tensor]:
        """Yield the rows of all processes, in the same blocks on each; every process iterates to the end."""
        for source in range(self.processes):
            own = self.local_blocks() if source == self.rank else None
            count = len(range(source, self.count, self.processes))
            for start in range(0, count, BLOCK):
                block = next(own) if own is not None else torch.empty(min(BLOCK, count - start), self.dim)
                yield sent_from(source, block)

    def rows(self, numbers: np.ndarray) -> Tensor:
        """Return the features of images, (B, D), in the order of ``numbers``; every process calls it with the same ones."""
        if self.processes == 1:
            return self.local(numbers)
        found = torch.zeros(len(numbers), self.dim)
        here = numbers % self.processes == self.rank
        found[torch.from_numpy(here)] = self.local(numbers[here] // self.processes)
        return summed(found)
