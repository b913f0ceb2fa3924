"""Shards of a remote split: fetched ahead into the cache, memory-mapped from there, released."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from mf_lightning.data.cache import ShardCache
from mf_lightning.data.opened import OpenShard, map_array
from mf_lightning.data.remote import RemoteFolder
from mf_lightning.data.shards import DatasetInfo, check_labels
from mf_lightning.data.threads import Threads
from mf_lightning.types import UserError

FETCHES = 4
"""Shards that are fetched at the same time."""
_HEADER = 128  # bytes before the array in a .npy file


class RemoteShards(Sequence[OpenShard]):
    """All shards of a remote split; taking one waits until it is fetched, ``expect`` begins that early.

    Args:
        folder: of the data set.
        cache: where fetched files lie.
        info: the data set's description.
        split: name of the split.

    Raises:
        UserError: an entry of ``dataset.json`` is no checksum.
    """

    def __init__(self, folder: RemoteFolder, cache: ShardCache, info: DatasetInfo, split: str) -> None:
        self.folder = folder
        self.cache = cache
        self.info = info
        self.split = split
        self.entries = info.splits[split]
        self.counts = [entry.count for entry in self.entries]
        self.has_flip = info.flip
        for entry in self.entries:
            for ending in info.files:
                if not re.fullmatch("[0-9a-f]{64}", str(entry.sha256.get(ending))):
                    raise UserError(
                        f"Got {entry.sha256.get(ending)!r} as checksum of '{self._name(entry.name, ending)}' in '{folder.url}'"
                        ", expected 64 hexadecimal digits: nothing is read unchecked from a server. Prepare the data set again."
                    )
        self._threads = Threads(FETCHES, name="fetch-ahead")
        self._futures: dict[int, Future[OpenShard]] = {}
        self._recent: deque[frozenset[int]] = deque()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> OpenShard:
        """Return a shard, which stays in the cache as long as anybody holds it."""
        future = self._futures.get(number)
        return self._open(number) if future is None else future.result()

    def __del__(self) -> None:
        if hasattr(self, "_threads"):
            for future in self._futures.values():
                future.cancel()
            self._threads.close()

    @property
    def largest(self) -> int:
        """Bytes of the largest shard with all its files."""
        return max((sum(self._size(number, ending) for ending in self.info.files) for number in range(len(self))), default=0)

    def expect(self, numbers: Sequence[int], *, in_flight: int) -> None:
        """Begin to fetch shards, and release those that no recent call named.

        Args:
            numbers: in the order in which they will be needed.
            in_flight: batches that may still be made at the same time; their shards are kept.
        """
        self._recent.append(frozenset(numbers))
        while len(self._recent) > in_flight + 1:
            self._recent.popleft()
        kept = frozenset().union(*self._recent)
        for number in [number for number in self._futures if number not in kept]:
            self._futures.pop(number).cancel()
        for number in numbers:
            if number not in self._futures:
                self._futures[number] = self._threads.submit(lambda number=number: self._open(number))

    def labels(self) -> np.ndarray:
        """Return the labels of all rows, (N,) int64, which are fetched without the latents."""
        wanted = [self._threads.submit(lambda number=number: np.array(self._labels(number))) for number in range(len(self))]
        return np.concatenate([future.result() for future in wanted]) if wanted else np.zeros(0, np.int64)

    def _open(self, number: int) -> OpenShard:
        labels = self._labels(number)
        latents = self._array(number, "latents")
        return OpenShard(latents, labels, self._array(number, "latents_flip") if self.has_flip else None)

    def _labels(self, number: int) -> np.ndarray:
        labels = self._array(number, "labels")
        where = f"{self.folder.url}/{self._name(self.entries[number].name, 'labels')}"
        check_labels(labels, len(self.info.class_names), where=where)
        return labels

    def _array(self, number: int, ending: str) -> np.ndarray:
        entry = self.entries[number]
        name, size = self._name(entry.name, ending), self._size(number, ending)
        sha256 = entry.sha256[ending]
        shape, dtype = self._layout(number, ending)
        with self.cache.open(
            sha256, size, lambda new_file: self.folder.fetch(name, new_file, sha256=sha256, size=size - _HEADER)
        ) as stream:
            return map_array(stream, shape=shape, dtype=dtype, where=f"{self.folder.url}/{name}")

    def _layout(self, number: int, ending: str) -> tuple[tuple[int, ...], np.dtype]:
        count = self.counts[number]
        if ending == "labels":
            return (count,), np.dtype(np.int64)
        return (count, *self.info.stored_shape), np.dtype(self.info.dtype)

    def _size(self, number: int, ending: str) -> int:
        shape, dtype = self._layout(number, ending)
        return math.prod(shape) * dtype.itemsize + _HEADER

    def _name(self, shard: str, ending: str) -> str:
        return f"{self.split}/{shard}.{ending}.npy"
