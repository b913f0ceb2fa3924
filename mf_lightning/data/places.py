"""Where a data set lies: a directory, or a URL whose shards come through a cache."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mf_lightning.data.cache import ShardCache
from mf_lightning.data.opened import OpenShard
from mf_lightning.data.remote import RemoteFolder
from mf_lightning.data.shards import DatasetInfo, open_split, read_info
from mf_lightning.data.streamed import RemoteShards
from mf_lightning.types import UserError

REMOTE_WINDOW = 8
"""Shards of a remote set whose rows are shuffled together where nothing else is asked for."""


class Place(ABC):
    """A data set that can be opened."""

    info: DatasetInfo
    remote: bool
    window: int | None
    """Shards whose rows are shuffled together; None shuffles all rows together."""

    @abstractmethod
    def shards(self, split: str, *, checksums: bool, window: int) -> Sequence[OpenShard]:
        """Return the shards of a split, of which those of two windows are in use at a time."""

    @abstractmethod
    def labels(self, split: str) -> np.ndarray:
        """Return the labels of a split, (N,) int64, without reading latents."""


class LocalPlace(Place):
    """A directory.

    Args:
        path: with ``dataset.json`` in it.
        window: shards whose rows are shuffled together; None shuffles all rows together.
    """

    remote = False

    def __init__(self, path: str, *, window: int | None) -> None:
        self.path = path
        self.window = window
        self.info = read_info(path)

    def shards(self, split: str, *, checksums: bool, window: int) -> Sequence[OpenShard]:
        """Return the memory-mapped shards of a split."""
        return open_split(self.path, self.info, split, checksums=checksums)

    def labels(self, split: str) -> np.ndarray:
        """Return the labels of a split, (N,) int64."""
        shards = self.shards(split, checksums=False, window=1)
        return np.concatenate([np.zeros(0, np.int64), *(shard.labels for shard in shards)])


class RemotePlace(Place):
    """A URL.

    Args:
        folder: with ``dataset.json`` in it.
        cache_dir: where fetched shards lie; None is ``mf_lightning/shards`` in the user's cache folder.
        cache_size: GB (10^9 bytes) that they may take.
        window: shards whose rows are shuffled together; None is 8.
    """

    remote = True

    def __init__(self, folder: RemoteFolder, *, cache_dir: str | None, cache_size: float, window: int | None) -> None:
        self.folder = folder
        self.info = folder.read_info()
        self.window = REMOTE_WINDOW if window is None else window
        self.cache = ShardCache(Path(cache_dir) if cache_dir else default_cache_dir(), int(cache_size * 1e9))

    def shards(self, split: str, *, checksums: bool, window: int) -> Sequence[OpenShard]:
        """Return the shards of a split, fetched when they are needed.

        Raises:
            UserError: the cache is too small for two windows.
        """
        shards = RemoteShards(self.folder, self.cache, self.info, split)
        needed = min(2 * window, len(shards)) * shards.largest
        if needed > self.cache.limit:
            raise UserError(
                f"Got data.init_args.cache_size = {self.cache.limit / 1e9:.3g} GB, expected at least {needed / 1e9:.3g} GB: "
                f"{window} shard(s) of '{split}' are read while as many are fetched. Raise it, or lower "
                "data.init_args.shuffle_window."
            )
        return shards

    def labels(self, split: str) -> np.ndarray:
        """Return the labels of a split, (N,) int64; only they are fetched."""
        return RemoteShards(self.folder, self.cache, self.info, split).labels()


def default_cache_dir() -> Path:
    """Return the folder of fetched shards where none is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mf_lightning" / "shards"


def open_place(
    path: str,
    *,
    window: int | None,
    cache_dir: str | None,
    cache_size: float,
    storage_options: Mapping[str, Any] | None,
    fetch_retries: int,
    fetch_timeout: float,
) -> Place:
    """Return the place at a path or URL; arguments as in ``LatentDataModule``.

    Raises:
        UserError: values out of range, options of a URL for a directory, and what the place itself refuses.
    """
    checks = [
        ("shuffle_window", window, window is None or window >= 1, "at least 1 shard, or null"),
        ("cache_size", cache_size, cache_size > 0, "a number of GB above 0"),
        ("fetch_retries", fetch_retries, fetch_retries >= 0, "0 or more"),
        ("fetch_timeout", fetch_timeout, fetch_timeout > 0, "seconds above 0"),
    ]
    for name, value, good, expected in checks:
        if not good:
            raise UserError(f"Got data.init_args.{name} = {value}, expected {expected}.")
    if "://" in path:
        folder = RemoteFolder(path, storage_options or {}, retries=fetch_retries, timeout=fetch_timeout)
        return RemotePlace(folder, cache_dir=cache_dir, cache_size=cache_size, window=window)
    for name, value in (("cache_dir", cache_dir), ("storage_options", storage_options)):
        if value is not None:
            raise UserError(
                f"Got data.init_args.{name} = {value} for the directory '{path}', expected it for a URL only: a directory is "
                "read where it lies. Leave it out, or give the path as file:///... to read it through the cache."
            )
    return LocalPlace(path, window=window)
