"""From memory-mapped shards to batches: which sample goes where is a function of (seed, position), nothing is remembered.

Training reads one endless stream: position p is sample ``p mod N`` of the order of epoch ``p div N``, and optimizer
step s takes positions [s B, (s + 1) B) of a global batch B. Row i of a step goes to deal ``i mod D`` of the D = accumulated
batches x devices deals, so neither number changes which sample gets which noise and times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mf_lightning import draws
from mf_lightning.data.buffers import Buffers
from mf_lightning.data.opened import OpenShard
from mf_lightning.data.order import GlobalOrder, WindowOrder
from mf_lightning.data.streamed import RemoteShards
from mf_lightning.data.threads import made_ahead
from mf_lightning.draws import Stream
from mf_lightning.types import LatentBatch, UserError


class LatentSplit:
    """All samples of a split behind one index.

    Args:
        shards: memory-mapped, plain arrays, or remote.
        rows: sorted rows of the split that are samples, (N,) int64; None takes all.
        window: shards whose rows are shuffled together; None shuffles all rows together.
    """

    def __init__(self, shards: Sequence[OpenShard], *, rows: np.ndarray | None = None, window: int | None = None) -> None:
        self.remote = shards if isinstance(shards, RemoteShards) else None
        self.shards = shards if self.remote else list(shards)
        counts = self.remote.counts if self.remote else [len(shard.labels) for shard in shards]
        self.starts = np.cumsum([0, *counts])
        self.labels = None if self.remote else np.concatenate([np.zeros(0, np.int64), *(shard.labels for shard in shards)])
        self.has_flip = self.remote.has_flip if self.remote else all(shard.latents_flip is not None for shard in shards)
        self.rows = rows
        self._buffers = Buffers()
        self.window = window

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.rows is None else len(self.rows)

    def order(self, seed: int) -> GlobalOrder | WindowOrder:
        """Return the order in which an epoch takes the samples."""
        if self.window is None:
            return GlobalOrder(len(self), seed=seed)
        bounds = self.starts if self.rows is None else np.searchsorted(self.rows, self.starts)
        return WindowOrder(np.diff(bounds), seed=seed, window=self.window)

    def expect(self, shards: Sequence[int], *, in_flight: int) -> None:
        """Begin to fetch shards of a remote split and release the others, see ``RemoteShards.expect``."""
        if self.remote is not None:
            self.remote.expect(shards, in_flight=in_flight)

    def shards_of(self, index: np.ndarray) -> np.ndarray:
        """Return the shard of each sample, (B,)."""
        rows = index if self.rows is None else self.rows[index]
        return np.searchsorted(self.starts, rows, side="right") - 1

    def gather(self, index: np.ndarray, flip: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return stored latents, (B, ...), and labels, (B,), of samples.

        Args:
            index: numbers of the samples, (B,).
            flip: which rows take the mirrored copy, (B,) bool; None takes none.

        Raises:
            UserError: a shard's file is gone or cut since it was opened.
        """
        latents, labels = self.tensors(index, flip)
        return latents.numpy(), labels.numpy()

    def tensors(self, index: np.ndarray, flip: np.ndarray | None = None, *, pinned: bool = False) -> tuple[Tensor, Tensor]:
        """Return what ``gather`` returns, as tensors; ``pinned`` puts them where a GPU copies from without the host waiting."""
        rows = index if self.rows is None else self.rows[index]
        assert len(rows), "a batch has rows"
        assert rows.min() >= 0, "samples are numbers of this split"
        assert rows.max() < self.starts[-1], "samples are numbers of this split"
        first = self.shards[int(np.searchsorted(self.starts, rows[0], side="right")) - 1].latents
        shape = (len(rows), *first.shape[1:])
        if pinned:  # torch keeps such memory for use again by itself
            dtype = torch.from_numpy(np.empty(0, first.dtype)).dtype
            latents = torch.empty(shape, dtype=dtype, pin_memory=True)
            labels = torch.empty(len(rows), dtype=torch.int64, pin_memory=True)
        else:
            latents, labels = self._buffers.empty(shape, first.dtype), torch.empty(len(rows), dtype=torch.int64)
        self._fill(latents.numpy(), labels.numpy(), rows, flip)
        return latents, labels

    def _fill(self, latents: np.ndarray, labels: np.ndarray, rows: np.ndarray, flip: np.ndarray | None) -> None:
        """Copy each row once."""
        if len(self.shards) == 1 and flip is None:  # one call is faster than a loop; indices are valid, nothing is clipped
            shard = self.shards[0]
            shard.check_files()
            np.asarray(shard.latents).take(rows, axis=0, out=latents, mode="clip")
            labels[:] = shard.labels[rows]
            return
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        local = (rows - self.starts[shard_of]).tolist()
        numbers = shard_of.tolist()
        opened = {number: self.shards[number] for number in set(numbers)}
        for shard in opened.values():
            shard.check_files()
        if flip is None:
            row_of = {number: shard.flat[0].__getitem__ for number, shard in opened.items()}
            stored = [row_of[number](row) for number, row in zip(numbers, local, strict=True)]
        else:
            flat = {number: shard.flat for number, shard in opened.items()}
            stored = [flat[number][copy][row] for number, copy, row in zip(numbers, flip.tolist(), local, strict=True)]
        np.concatenate(stored, out=latents.reshape(-1))  # views of the maps: each row is copied once
        if self.labels is None:
            labels[:] = [opened[number].labels[row] for number, row in zip(numbers, local, strict=True)]
        else:
            labels[:] = self.labels[rows]


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
        workers: threads that make batches ahead; 0 makes each when it is asked for.
        pinned: make batches in pinned memory.

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
        workers: int = 0,
        pinned: bool = False,
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
        self.workers = workers
        self.pinned = pinned
        self._order = split.order(seed)

    def __len__(self) -> int:
        """Batches that this device takes per epoch of Lightning: whole optimizer steps only."""
        return len(self.split) // self.global_batch_size * self.accumulate

    def __iter__(self) -> Iterator[LatentBatch]:
        return made_ahead(self._tasks(self.start_step()), workers=self.workers)

    def _tasks(self, first: int) -> Iterator[Callable[[], LatentBatch]]:
        for number in range(len(self)):
            step, part = first + number // self.accumulate, number % self.accumulate
            rows = np.arange(part * self.world_size + self.rank, self.global_batch_size, self.deals)
            positions = step * self.global_batch_size + rows
            index = self.samples_at(positions)
            if self.split.remote is not None:
                epoch, offsets = np.divmod(positions, len(self.split))
                here = offsets[epoch == epoch[0]]
                self.split.expect(self._order.shards_from(int(epoch[0]), here), in_flight=2 * self.workers + 1)
            yield partial(self._batch, step, rows, index)

    def _batch(self, step: int, rows: np.ndarray, index: np.ndarray) -> LatentBatch:
        row = torch.from_numpy(rows)
        flip = None
        if self.split.has_flip:
            flip = (draws.uniform(self.seed, Stream.FLIP, step=step, rows=row, count=1)[:, 0] < 0.5).numpy()
        latents, labels = self.split.tensors(index, flip, pinned=self.pinned)
        return LatentBatch(latents, labels, torch.from_numpy(index), row)

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample at each position of the stream, (B,) int64; positions ascend and span two epochs at most."""
        samples = len(self.split)
        first = int(positions[0]) // samples
        if positions[-1] < (first + 1) * samples:
            return self._order.at(first, positions - first * samples)
        epoch, offset = np.divmod(positions, samples)
        index = np.empty(len(positions), np.int64)
        for number in np.unique(epoch):
            here = epoch == number
            index[here] = self._order.at(int(number), offset[here])
        return index


class EvalLoader:
    """Every sample of a split once, in order; sample i on device ``i mod world_size``.

    All devices have equally many batches, as a sharded network needs: one that has run out repeats sample 0 with row -1, which
    counts for nothing.

    Args:
        split: samples.
        batch_size: per device.
        rank: of this device.
        world_size: number of devices.
        workers: threads that make batches ahead; 0 makes each when it is asked for.
        pinned: make batches in pinned memory.
    """

    def __init__(
        self, split: LatentSplit, *, batch_size: int, rank: int, world_size: int, workers: int = 0, pinned: bool = False
    ) -> None:
        self.split = split
        self.workers = workers
        self.pinned = pinned
        self.batch_size = batch_size
        self.mine = np.arange(rank, len(split), world_size)
        self.largest = -(-len(split) // world_size)

    def __len__(self) -> int:
        return -(-self.largest // self.batch_size)

    def __iter__(self) -> Iterator[LatentBatch]:
        return made_ahead(self._tasks(), workers=self.workers)

    def _tasks(self) -> Iterator[Callable[[], LatentBatch]]:
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = self.mine[start : start + self.batch_size]
            filling = len(index) == 0
            index = np.zeros(1, np.int64) if filling else index
            if self.split.remote is not None:
                shards = np.unique(self.split.shards_of(index))
                following = range(shards[-1] + 1, min(shards[-1] + 2, len(self.split.shards)))
                self.split.expect([*shards.tolist(), *following], in_flight=2 * self.workers + 1)
            yield partial(self._batch, index, filling)

    def _batch(self, index: np.ndarray, filling: bool) -> LatentBatch:
        latents, labels = self.split.tensors(index, pinned=self.pinned)
        numbers = torch.from_numpy(index)
        return LatentBatch(latents, labels, numbers, numbers - 1 if filling else numbers)
