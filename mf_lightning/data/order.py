"""In which order an epoch takes the samples: a pure function of (seed, epoch), whatever the devices and interruptions.

``GlobalOrder`` shuffles over the whole split. ``WindowOrder`` shuffles the shards, then the rows within each window of a few
shards, so that only two windows have to be at hand: the one that is read and the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class GlobalOrder:
    """One permutation of all samples per epoch.

    Args:
        samples: how many there are.
        seed: of the permutations.
    """

    def __init__(self, samples: int, *, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._known: tuple[int, np.ndarray] | None = None

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """Return the samples at places of an epoch, (B,) int64."""
        if self._known is None or self._known[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._known = (epoch, generator.permutation(self.samples))
        return self._known[1][offsets]

    def shards_from(self, epoch: int, offsets: np.ndarray) -> list[int]:
        """Return no shards: any may be next."""
        return []


class WindowOrder:
    """Shards shuffled per epoch, rows shuffled within each window of shards; shards without samples are left out.

    Args:
        counts: samples of each shard, numbered on from shard to shard.
        seed: of the permutations.
        window: shards whose rows are shuffled together.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, window: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.firsts = np.cumsum(self.counts) - self.counts
        self.filled = np.flatnonzero(self.counts)
        self.seed = seed
        self.window = window
        self._plans: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """Return the samples at places of an epoch, (B,) int64."""
        _, starts = self._plan(epoch)
        index = np.empty(len(offsets), np.int64)
        number_of = np.searchsorted(starts, offsets, side="right") - 1
        for number in np.unique(number_of):
            here = number_of == number
            index[here] = self._rows(epoch, int(number))[offsets[here] - starts[number]]
        return index

    def shards_from(self, epoch: int, offsets: np.ndarray) -> list[int]:
        """Return the shards of the windows that these places lie in, and of the window after the first of them."""
        windows, starts = self._plan(epoch)
        numbers = np.unique(np.searchsorted(starts, offsets, side="right") - 1)
        shards = [int(shard) for number in numbers for shard in windows[number]]
        following = numbers[0] + 1
        after = windows[following] if following < len(windows) else self._plan(epoch + 1)[0][0]
        return shards + [int(shard) for shard in after if shard not in shards]

    def _plan(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the windows of an epoch, each an array of shards, and the place at which each starts."""
        if epoch not in self._plans:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            shards = self.filled[generator.permutation(len(self.filled))]
            windows = [shards[first : first + self.window] for first in range(0, len(shards), self.window)]
            ends = np.cumsum([self.counts[window].sum() for window in windows])
            self._plans = {e: plan for e, plan in self._plans.items() if abs(e - epoch) < 2}
            self._plans[epoch] = (windows, np.concatenate([[0], ends[:-1]]))
        return self._plans[epoch]

    def _rows(self, epoch: int, number: int) -> np.ndarray:
        """Return the shuffled samples of a window; its draws are those of another counter than the shards'."""
        if (epoch, number) not in self._known:
            shards = self._plan(epoch)[0][number]
            rows = np.concatenate([np.arange(self.firsts[s], self.firsts[s] + self.counts[s]) for s in shards])
            bits = np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, 1 + number])
            while len(self._known) > 1:  # a batch lies in two windows where it lies in more than one
                self._known.pop(next(iter(self._known)))
            self._known[epoch, number] = rows[np.random.Generator(bits).permutation(len(rows))]
        return self._known[epoch, number]
