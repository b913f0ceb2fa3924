"""Moments as diffusers' and LDM's posteriors keep them, of the picture and of its mirror image: MAR's files, zhuyu-cs' LMDB.

MAR, LTH14/mar e0cccf8 ``engine_mar.py`` (cache_latents) and ``util/loader.py``: ``CLASS/IMAGE.JPEG.npz`` with ``moments`` and
``moments_flip``; the label is the place of CLASS among the sorted folders. zhuyu-cs/MeanFlow 86c9116
``preprocess_imagenet/main_cache.py`` and e5b91d5 ``dataset.py``: an LMDB with the keys "0", "1", ..., each a pickled dict of
``moments``, ``moments_flip``, ``label`` and ``filename``, and ``num_samples``, which is written last. Both hold
``posterior.parameters``: mean and LOG-VARIANCE, stacked, (2C, h, w), not clamped, unscaled. zhuyu-cs' preparation always takes
sd-vae-ft-ema; its training multiplies by 0.18125, an adopted data set says SD-VAE's own 0.18215. MAR's autoencoder is its own
(kl16, 16 channels, 0.2325).
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mf_lightning.data.foreign.source import (
    DAMAGE,
    Facts,
    FilePerSample,
    Rows,
    Source,
    check_sample,
    files_below,
    unreadable,
    whole_label,
)
from mf_lightning.data.walk import check_link
from mf_lightning.types import UserError

KEYS = ("moments", "moments_flip")


class FolderSource(FilePerSample):
    """MAR's cache: a folder per class, an .npz file per image.

    Args:
        path: the folder of the class folders.
        follow_links: also take what symbolic links out of the folder point to.

    Raises:
        UserError: files outside of a class folder, or a folder without files.
    """

    layout = "a folder per class with an .npz file per image (moments, moments_flip)"
    holds = "mean_logvar"

    def __init__(self, path: Path, follow_links: bool = False) -> None:
        files = sorted(files_below(path, ".npz", follow_links=follow_links))
        flat = [name for name in files if "/" not in name]
        if flat:
            raise UserError(
                f"Got '{path / flat[0]}' outside of a class folder, expected CLASS/IMAGE.npz. Move it, or remove it."
            )
        folders = (entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        self.class_names = tuple(sorted(folders))
        empty = sorted(set(self.class_names) - {name.split("/")[0] for name in files})
        if empty:
            raise UserError(
                f"Got the class folder '{path / empty[0]}' without an .npz file ({len(empty):,} such folders), expected some "
                "in each: a class's number is its folder's place among all. Copy the rest, or remove what is no class."
            )
        self.number_of = {name: number for number, name in enumerate(self.class_names)}
        super().__init__(path, files)

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Look into the first .npz file of a class folder."""
        first = next(files_below(path, ".npz", follow_links=True), None) if path.is_dir() else None
        if first is None or "/" not in first:
            return False
        try:
            with zipfile.ZipFile(path / first) as content:
                return f"{KEYS[0]}.npy" in content.namelist()
        except DAMAGE:
            return True  # whoever reads it names it as damaged

    def read_file(self, number: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Read both arrays of one image."""
        file = self.root / self.files[number]
        try:
            with np.load(file, allow_pickle=False) as content:
                moments, mirrored = (content[key] for key in KEYS)
        except DAMAGE as error:
            raise unreadable(file, error) from error
        return moments, self.number_of[self.files[number].split("/")[0]], mirrored


class LmdbSource(Source):
    """zhuyu-cs' LMDB; what is pickled in it is read as numbers and names only.

    Args:
        path: the folder with ``data.mdb``.
        follow_links: also read it where it is a symbolic link out of the folder.

    Raises:
        UserError: truncated, or its preparation was not finished.
        ImportError: lmdb is not installed.
    """

    layout = "an LMDB (a folder with data.mdb) with moments, moments_flip and label"
    holds = "mean_logvar"
    facts = Facts("stabilityai/sd-vae-ft-ema", 0.18215, 0.0, 8)
    flip = True

    def __init__(self, path: Path, follow_links: bool = False) -> None:
        self.path = path
        check_link(path / "data.mdb", path, follow_links=follow_links)
        _check_whole(self.environment, path / "data.mdb")
        with self.environment.begin() as view:
            count = view.get(b"num_samples")
        if count is None or not count.isdigit() or int(count) == 0:
            raise UserError(
                f"Got '{path}' with num_samples = {count!r}, expected their number, which zhuyu-cs' preparation writes last. "
                "Check KIND and SOURCE, or finish that preparation."
            )
        self.count = int(count)
        first = self._sample(0)["moments"]
        check_sample(first, self.name(0))
        self.shape, self.dtype = first.shape, first.dtype

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Look for LMDB's own file name."""
        return (path / "data.mdb").is_file()

    @cached_property
    def environment(self):
        """The open LMDB, which nothing is written to."""
        try:
            import lmdb
        except ImportError as error:
            raise ImportError("An LMDB needs the package lmdb: pip install 'mf_lightning[adopt]'") from error
        try:
            return lmdb.open(str(self.path), readonly=True, lock=False, readahead=False, max_spare_txns=1)
        except lmdb.Error as error:
            raise unreadable(self.path / "data.mdb", error) from error

    def __len__(self) -> int:
        return self.count

    def name(self, number: int) -> str:
        """Return file and key."""
        return f"'{self.path / 'data.mdb'}', key {number}"

    def contents(self) -> Iterator[str]:
        """Yield the count: the keys are but numbers."""
        yield str(self.count)

    def read(self, index: np.ndarray) -> Rows:
        """Read samples by their keys."""
        stored = np.empty((2, len(index), *self.shape), self.dtype)
        labels = np.empty(len(index), np.int64)
        for row, number in enumerate(index):
            sample = self._sample(int(number))
            for copy, key in enumerate(KEYS):
                self.check_like_first(sample[key].shape, sample[key].dtype, f"{key} of {self.name(int(number))}")
                stored[copy, row] = sample[key]
            labels[row] = whole_label(sample["label"], self.name(int(number)))
        return Rows(stored[0], labels, stored[1])

    def _sample(self, number: int) -> dict[str, Any]:
        import lmdb

        try:
            with self.environment.begin() as view:
                value = view.get(str(number).encode())
        except lmdb.Error as error:
            raise unreadable(self.name(number), error) from error
        if value is None:
            raise UserError(
                f"Got no {self.name(number)}, expected the keys 0 to {self.count - 1}. Finish the LMDB's preparation."
            )
        try:
            sample = NumbersUnpickler(io.BytesIO(value)).load()
        except DAMAGE as error:
            raise unreadable(self.name(number), error) from error
        whole = isinstance(sample, dict) and {*KEYS, "label"} <= set(sample)
        if not (whole and all(isinstance(sample[key], np.ndarray) for key in KEYS)):
            raise UserError(
                f"Got other things in {self.name(number)}, expected {', '.join(KEYS)}, label. Check KIND and SOURCE."
            )
        return sample


class NumbersUnpickler(pickle.Unpickler):
    """Reads a pickle of arrays, numbers, strings and containers; any other name in it ends the reading, nothing is called."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of numpy's own builders of arrays.

        Raises:
            pickle.UnpicklingError: for any other name.
        """
        owner = "numpy" if module.split(".")[0] == "numpy" else module
        if (owner, name) not in _BUILDERS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array of numbers")
        return _BUILDERS[owner, name]


_BUILDERS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "_reconstruct"): np.zeros(1).__reduce__()[0],
    ("numpy", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    ("numpy", "scalar"): np.int64(0).__reduce__()[0],
}


def _check_whole(environment, file: Path) -> None:
    """Refuse a file that ends before its last page: reading behind the end of a mapped file kills the process."""
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = os.stat(file).st_size
    if size < needed:
        raise unreadable(file, EOFError(f"{size:,} bytes, at least {needed:,} are in use"))
