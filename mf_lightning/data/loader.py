"""From memory-mapped shards to batches: which sample goes where is a function of (seed, position), nothing is remembered.

Training reads one endless stream: position p is sample ``p mod N`` of the permutation of epoch ``p div N``, and optimizer
step s takes positions [s B, (s + 1) B) of a global batch B. Row i of a step goes to deal ``i mod D`` of the D = accumulated
batches x devices deals, so neither number changes which sample gets which noise and times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mf_lightning import draws
from mf_lightning.data.shards import OpenShard
from mf_lightning.draws import Stream
from mf_lightning.types import LatentBatch, UserError


class LatentSplit:
    """All rows of a split behind one index.

    Args:
        shards: memory-mapped, or plain arrays.
    """

    def __init__(self, shards: Sequence[OpenShard]) -> None:
        self.shards = list(shards)
        self.starts = np.cumsum([0, *(len(shard.labels) for shard in self.shards)])
        self.has_flip = all(shard.latents_flip is not None for shard in self.shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, index: np.ndarray, flip: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return stored latents, (B, ...), and labels, (B,), of samples: one indexing step per shard that occurs.

        Args:
            index: numbers of the samples, (B,).
            flip: which rows take the mirrored copy, (B,) bool; None takes none.

        Raises:
            UserError: a shard's file is gone or cut since it was opened.
        """
        if len(self.shards) == 1 and flip is None:
            self.shards[0].check_files()
            return self.shards[0].latents[index], np.asarray(self.shards[0].labels[index])
        shard_of = np.searchsorted(self.starts, index, side="right") - 1
        first = self.shards[0].latents
        latents = np.empty((len(index), *first.shape[1:]), first.dtype)
        labels = np.empty(len(index), np.int64)
        mirrored = np.zeros(len(index), bool) if flip is None else flip
        for number in np.unique(shard_of):
            shard, here = self.shards[number], shard_of == number
            shard.check_files()
            labels[here] = shard.labels[index[here] - self.starts[number]]
            for copy, rows in ((shard.latents, here & ~mirrored), (shard.latents_flip, here & mirrored)):
                if rows.any():
                    latents[rows] = copy[index[rows] - self.starts[number]]
        return latents, labels


class TrainLoader:
    """Batches of this device, from the position that ``start_step`` tells on.

    Args:
        split: samples.
        global_batch_size: rows per optimizer step over all devices and accumulated batches.
        seed: of the order and of the mirroring.
        rank: of this device.
        world_size: number of devices.
        accumulate: batches per optimizer step on one device.
        start_step: tells the optimizer step at which iteration starts, so that a resumed run goes on where it stopped.

    Raises:
        UserError: the global batch does not divide among the deals, or is larger than the split.
    """

    def __init__(
        self,
        split: LatentSplit,
        *,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        accumulate: int,
        start_step: Callable[[], int],
    ) -> None:
        self.deals = accumulate * world_size
        if global_batch_size < 1 or global_batch_size % self.deals:
            raise UserError(
                f"Got a global batch of {global_batch_size} for {world_size} device(s) x {accumulate} accumulated "
                f"batch(es), expected a multiple of {self.deals}. Change data.batch_size or the number of devices."
            )
        if len(split) < global_batch_size:
            raise UserError(
                f"Got {len(split)} training samples for a global batch of {global_batch_size}, expected at least one batch. "
                "Lower data.batch_size."
            )
        self.split = split
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate
        self.start_step = start_step
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Batches that this device takes per epoch of Lightning: whole optimizer steps only."""
        return len(self.split) // self.global_batch_size * self.accumulate

    def __iter__(self) -> Iterator[LatentBatch]:
        first = self.start_step()
        for number in range(len(self)):
            step, part = first + number // self.accumulate, number % self.accumulate
            rows = np.arange(part * self.world_size + self.rank, self.global_batch_size, self.deals)
            yield self._batch(step, rows)

    def _batch(self, step: int, rows: np.ndarray) -> LatentBatch:
        index = self.samples_at(step * self.global_batch_size + rows)
        row = torch.from_numpy(rows)
        flip = None
        if self.split.has_flip:
            flip = (draws.uniform(self.seed, Stream.FLIP, step=step, rows=row, count=1)[:, 0] < 0.5).numpy()
        latents, labels = self.split.gather(index, flip)
        return LatentBatch(torch.from_numpy(latents), torch.from_numpy(labels), torch.from_numpy(index), row)

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample at each position of the endless stream, (B,) int64; positions span two epochs at most."""
        epoch, offset = np.divmod(positions, len(self.split))
        index = np.empty(len(positions), np.int64)
        for number in np.unique(epoch):
            here = epoch == number
            index[here] = self._permutation(int(number))[offset[here]]
        return index

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = (epoch, generator.permutation(len(self.split)))
        return self._order[1]


class EvalLoader:
    """Every sample of a split once, in order; sample i on device ``i mod world_size``.

    All devices have equally many batches, as a sharded network needs: one that has run out repeats sample 0 with row -1, which
    counts for nothing.

    Args:
        split: samples.
        batch_size: per device.
        rank: of this device.
        world_size: number of devices.
    """

    def __init__(self, split: LatentSplit, *, batch_size: int, rank: int, world_size: int) -> None:
        self.split = split
        self.batch_size = batch_size
        self.mine = np.arange(rank, len(split), world_size)
        self.largest = -(-len(split) // world_size)

    def __len__(self) -> int:
        return -(-self.largest // self.batch_size)

    def __iter__(self) -> Iterator[LatentBatch]:
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = self.mine[start : start + self.batch_size]
            filling = len(index) == 0
            index = np.zeros(1, np.int64) if filling else index
            latents, labels = self.split.gather(index)
            numbers = torch.from_numpy(index)
            rows = numbers - 1 if filling else numbers
            yield LatentBatch(torch.from_numpy(latents), torch.from_numpy(labels), numbers, rows)
