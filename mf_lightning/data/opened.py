"""Shards as the loader reads them: memory-mapped, looked at before each reading."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mf_lightning.types import UserError

SPARE_FILES = 256
"""Open files that everything else in the process may need."""
AGAIN = "Prepare the data set again, or copy the file once more."


@dataclass(frozen=True)
class OpenShard:
    """One shard, memory-mapped."""

    latents: np.ndarray
    labels: np.ndarray
    latents_flip: np.ndarray | None
    sizes: tuple[tuple[str, int], ...] = ()
    """Its files of latents and their sizes when it was opened; empty for one in memory or in the cache."""

    @cached_property
    def flat(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Latents and mirrored latents with one flat row per sample, (n, C h w)."""
        plain, mirrored = (
            None if array is None else np.asarray(array).reshape(len(array), -1) for array in (self.latents, self.latents_flip)
        )
        return plain, mirrored

    def check_files(self) -> None:
        """Look whether all files are as long as when they were opened: to read behind a map's end kills the process, silently.

        Raises:
            UserError: one is gone or has another size.
        """
        for file, size in self.sizes:
            try:
                found = os.stat(file).st_size
            except OSError as error:
                raise _lost_file(file, f"which is gone ({error.strerror})", size) from error
            if found != size:
                raise _lost_file(file, f"which now has {found:,} bytes", size)


def _lost_file(file: str, what: str, size: int) -> UserError:
    return UserError(
        f"Got '{file}', {what}, expected the {size:,} bytes that it had when it was opened: the data set was changed during "
        "the run. The last checkpoint is whole: bring the file back, then go on with --ckpt_path=auto."
    )


def allow_open_files(more: int) -> None:
    """Raise this process's limit of open files, by as many as needed: each memory map holds one, and 1024 is a common limit.

    Args:
        more: files that will be opened beside those that are open.

    Raises:
        UserError: the system's own limit is lower.
    """
    needed = len(os.listdir("/dev/fd")) + more + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"Got a limit of {hard:,} open files, expected at least {needed:,}: {more:,} of this data set stay open. Raise it "
            "(`ulimit -Hn`), or encode into fewer, larger shards."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_array(file: Path, *, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return a memory map of a shard's file after checking header and size.

    Raises:
        UserError: missing, truncated, or of another shape or dtype than ``dataset.json`` says.
    """
    if not file.is_file():
        raise UserError(f"Got no file '{file}', expected {shape} values of {dtype} in it. {AGAIN}")
    with file.open("rb") as stream:
        return map_array(stream, shape=shape, dtype=dtype, where=str(file))


def map_array(stream: BinaryIO, *, shape: tuple[int, ...], dtype: np.dtype, where: str) -> np.ndarray:
    """Return a memory map of an open .npy file; it keeps the file, and locks on it, open until the array is freed.

    Args:
        stream: the open file.
        shape: expected.
        dtype: expected.
        where: name of the file for messages.

    Raises:
        UserError: truncated, or of another shape or dtype than ``dataset.json`` says.
    """
    try:
        found_shape, found_dtype, fortran = _header(stream)
        order = "F" if fortran else "C"
        array = np.memmap(stream, dtype=found_dtype, mode="r", offset=stream.tell(), shape=found_shape, order=order)
    except (ValueError, EOFError, OSError) as error:
        size = os.fstat(stream.fileno()).st_size
        raise UserError(
            f"Got '{where}' of {size:,} bytes, which is no whole .npy file ({error}), expected {shape} values of {dtype}, "
            f"{math.prod(shape) * dtype.itemsize:,} bytes after the header. It looks truncated. {AGAIN}"
        ) from error
    if array.shape != shape or array.dtype != dtype:
        raise UserError(f"Got {array.shape} values of {array.dtype} in '{where}', expected {shape} of {dtype}. {AGAIN}")
    return array


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype, bool]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, dtype, fortran
