"""A data set's files one after the other: of a directory where they lie, of a URL fetched ahead and removed again."""

from __future__ import annotations

import math
import tempfile
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mf_lightning.data.checksum import file_checksum
from mf_lightning.data.opened import map_array, open_array
from mf_lightning.data.remote import RemoteFolder
from mf_lightning.data.shards import ShardInfo, read_info, shard_file
from mf_lightning.types import UserError

AHEAD = 4
"""Files that are fetched, or compared with their checksums, at the same time."""
BLOCK = 16 << 20
"""Bytes that are looked at in one step."""


@dataclass(frozen=True)
class File:
    """One file of a shard."""

    shard: ShardInfo
    ending: str
    first: int
    """Number of its first row within the split."""
    where: str
    """Path or URL."""
    coming: Future[np.ndarray]
    """The memory-mapped array; UserError where it is damaged, OSError where it cannot be read."""


class DataFiles:
    """A data set that is read once, in order. A URL's files are always fetched anew, whatever a cache holds.

    Args:
        path: directory, or URL in any protocol that fsspec knows.
        storage_options: of the URL's file system, as fsspec takes them.
        retries: how often a file is fetched again after a failure.
        timeout: seconds without progress after which a connection is given up.

    Raises:
        UserError: no data set there, or options of a URL for a directory.
    """

    def __init__(
        self,
        path: str | Path,
        storage_options: Mapping[str, Any] | None = None,
        *,
        retries: int = 5,
        timeout: float = 60.0,
    ) -> None:
        self.path, self.folder = str(path), None
        if retries < 0 or timeout <= 0:
            raise UserError(f"Got --fetch_retries {retries}, --fetch_timeout {timeout}, expected 0 or more, and above 0.")
        if "://" in self.path:
            try:
                self.folder = RemoteFolder(self.path, storage_options or {}, retries=retries, timeout=timeout)
                self.info = self.folder.read_info()
            except UserError as error:
                raise _by_options(error) from error
            return
        if storage_options is not None:
            raise UserError(f"Got --storage_options for the directory '{path}', expected them for a URL only. Leave them out.")
        self.info = read_info(path)

    def read(self, split: str, endings: Sequence[str], *, checksums: bool) -> Iterator[File]:
        """Yield the files of a split, shard by shard.

        Args:
            split: name of the split.
            endings: of the files to read.
            checksums: compare those of a directory; those of a URL always are.

        Raises:
            UserError: an unknown split.
        """
        if split not in self.info.splits:
            raise UserError(f"Got the split '{split}', expected one that '{self.path}' holds: {', '.join(self.info.splits)}.")
        waiting: deque[File] = deque()
        with tempfile.TemporaryDirectory(prefix="mf_lightning-", ignore_cleanup_errors=True) as aside:
            pool = ThreadPoolExecutor(AHEAD)
            try:
                first = 0
                for shard in self.info.splits[split]:
                    for ending in endings:
                        coming = pool.submit(self._open, split, shard, ending, Path(aside), checksums)
                        waiting.append(File(shard, ending, first, self._where(split, shard, ending), coming))
                        if len(waiting) > AHEAD:
                            yield waiting.popleft()
                    first += shard.count
                yield from waiting
            finally:
                pool.shutdown(cancel_futures=True)

    def _where(self, split: str, shard: ShardInfo, ending: str) -> str:
        if self.folder is None:
            return str(shard_file(self.path, split, shard.name, ending))
        return f"{self.folder.url}/{split}/{shard.name}.{ending}.npy"

    def _open(self, split: str, shard: ShardInfo, ending: str, aside: Path, checksums: bool) -> np.ndarray:
        shape, dtype = (shard.count, *self.info.stored_shape), np.dtype(self.info.dtype)
        if ending == "labels":
            shape, dtype = (shard.count,), np.dtype(np.int64)
        expected, where = str(shard.sha256.get(ending)), self._where(split, shard, ending)
        if self.folder is not None:
            name, size = f"{split}/{shard.name}.{ending}.npy", math.prod(shape) * dtype.itemsize
            try:
                file = self.folder.fetch(name, lambda: aside / uuid.uuid4().hex, sha256=expected, size=size)
            except UserError as error:
                raise _by_options(error) from error
            with file.open("rb") as stream:
                file.unlink()  # its bytes stay until the map is closed
                return map_array(stream, shape=shape, dtype=dtype, where=where)
        array = open_array(Path(where), shape=shape, dtype=dtype)
        if checksums and (found := file_checksum(Path(where))) != expected:
            raise UserError(f"Got checksum {found} of '{where}', expected {expected}: the file was altered or damaged.")
        return array


def _by_options(error: UserError) -> UserError:
    """Return a message that names a command's options instead of training's."""
    return UserError(str(error).replace("data.init_args.path", "the URL").replace("data.init_args.", "--"))


def blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a mapped array in pieces of bounded size, each with the number of its first row."""
    rows = max(1, BLOCK // max(1, array[:1].nbytes))
    for first in range(0, len(array), rows):
        yield first, array[first : first + rows]
