"""Reading and writing checkpoints: single files, and the doors through which sharded ones are reached as well."""

from __future__ import annotations

import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from mf_lightning.checkpoints import sharded
from mf_lightning.checkpoints.publish import aside_path, discard, final_path, publish, tidy_folder
from mf_lightning.types import UserError

_SEAL = "mf_lightning crc32 {:08x}"
"""Comment at the end of a file (a zip archive): CRC-32 of all before it, with its length taken as 0."""

_BLOCK, _PIECE = 1 << 24, 1 << 28
"""Bytes that are checked and written at a time; bytes after which they are sent to the disk."""

Place = Callable[[tuple[Any, ...], torch.Size], "Tensor | None"]
"""Tells, from a tensor's keys in the checkpoint and its shape, which tensor of this run it is laid out like; None: whole."""


def is_sharded_checkpoint(path: str | os.PathLike) -> bool:
    """Tell whether a checkpoint is a directory of shards."""
    return sharded.is_sharded(Path(path))


def tidy(folder: str | os.PathLike) -> None:
    """Remove what a killed run left half written in a folder of checkpoints."""
    if Path(folder).is_dir():
        tidy_folder(Path(folder))


def write_checkpoint(checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint in one file, aside, flush it to disk, then give it its name.

    Raises:
        UserError: the disk is full or not writable; what was at ``path`` is still there.
    """
    path = Path(path)
    step = checkpoint.get("global_step", 0)
    aside = aside_path(final_path(path, step))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        discard(aside)
        with aside.open("wb") as stream:
            torch.save(checkpoint, whole := _Checked(stream))
            _seal(stream, whole.checksum)
            stream.flush()
            os.fsync(stream.fileno())
        publish(aside, path, step=step)
    except (OSError, RuntimeError) as error:
        raise not_written(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


class _Checked:
    """A stream that only grows, the CRC-32 of what was written to it, and no more of it in the page cache than a piece.

    Left to the system, ten gigabytes of checkpoint fill the cache: the write then took three times as long, and pushed out the
    pages of the memory-mapped data set.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.checksum = stream, 0
        self._written = self._on_disk = 0

    def write(self, data: bytes) -> int:
        with memoryview(data).cast("B") as view:
            for start in range(0, len(view), _BLOCK):
                block = view[start : start + _BLOCK]
                self.checksum = zlib.crc32(block, self.checksum)
                self._stream.write(block)
                self._written += len(block)
                if self._written - self._on_disk >= _PIECE:
                    self._to_disk()
            return len(view)

    def _to_disk(self) -> None:
        self._stream.flush()
        handle = self._stream.fileno()
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(handle, self._on_disk, self._written - self._on_disk, os.POSIX_FADV_DONTNEED)
        self._on_disk = self._written

    def flush(self) -> None:
        self._stream.flush()


def _seal(stream: BinaryIO, checksum: int) -> None:
    """Write the checksum of a zip archive as its comment; the archive's last two bytes are the comment's length."""
    comment = _SEAL.format(checksum).encode()
    stream.seek(-2, os.SEEK_END)
    stream.write(len(comment).to_bytes(2, "little") + comment)


def not_written(path: Path, error: Exception) -> UserError:
    """Return what to tell a user whose checkpoint could not be written."""
    kept = f"The earlier {path} is still whole." if path.exists() else "Nothing was written."
    return UserError(
        f"Got no checkpoint written to {path} ({error}), expected space for it. {kept} Free some space and resume, "
        "or change trainer.default_root_dir."
    )


def read_checkpoint(
    path: str | os.PathLike,
    *,
    place: Place | None = None,
    mmap: bool = False,
    only: Callable[[tuple[Any, ...]], bool] | None = None,
    checked: bool = False,
) -> dict[str, Any]:
    """Check a checkpoint whole, then read it; no code in it is ever run (``weights_only``).

    Args:
        path: a file, or a directory of shards.
        place: for a sharded network, how each tensor is laid out; None reads every tensor whole, on the CPU.
        mmap: leave a file's tensors on disk until they are used.
        only: of a directory, read the tensors whose keys it accepts; the others lie on the device "meta".
        checked: the bytes were compared with their checksums already.

    Raises:
        UserError: no such checkpoint, a truncated or altered one, or one that needs code; names the newest good one beside it.
    """
    path = _existing(path)
    try:
        if not checked:
            verify(path)
        if path.is_dir():
            return sharded.read(path, place=place, only=only)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except sharded.READ_ERRORS as error:
        raise _unreadable(path, error) from error


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """Return everything of a checkpoint but the values of its tensors, unchecked and quickly.

    Raises:
        UserError: it cannot be read.
    """
    path = _existing(path)
    try:
        if path.is_dir():
            return sharded.read_header(path)
        return torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except sharded.READ_ERRORS as error:
        raise _unreadable(path, error) from error


def _existing(path: str | os.PathLike) -> Path:
    if not Path(path).exists():
        raise UserError(f"Got the checkpoint '{path}', which does not exist, expected one such as checkpoints/last.ckpt.")
    return Path(path)


def verify_together(path: Path, group: Any = None) -> None:
    """Check a directory of shards, each process a part of it; every process calls it.

    Raises:
        UserError: in all processes, where any of them found damage.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        sharded.verify(path, rank=rank, world=world)
        found = None
    except sharded.READ_ERRORS as error:
        found = error
    everyone: list[Any] = [found]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, found, group=group)
    damage = next((error for error in everyone if error is not None), None)
    if damage is not None:
        raise _unreadable(path, damage) from damage


def verify(path: Path) -> None:
    """Compare a checkpoint's bytes with the checksums written with them (CRC-32).

    Raises:
        RuntimeError, OSError: it is truncated, altered or no checkpoint.
    """
    if path.is_dir():
        sharded.verify(path)
        return
    length = len(_SEAL.format(0))
    with path.open("rb") as stream:
        body = stream.seek(0, os.SEEK_END) - length - 2
        if body < 0:
            raise RuntimeError("it is cut")
        stream.seek(0)
        checksum = 0
        for start in range(0, body, _BLOCK):
            checksum = zlib.crc32(stream.read(min(_BLOCK, body - start)), checksum)
        checksum = zlib.crc32(bytes(2), checksum)
        if not (end := stream.read())[2:].startswith(_SEAL[:12].encode()):
            raise RuntimeError("it has no checksum at its end: it is cut, or mf_lightning did not write it")
        if end != length.to_bytes(2, "little") + _SEAL.format(checksum).encode():
            raise RuntimeError("its bytes do not have the checksum at its end: it was altered")


def _unreadable(path: Path, error: Exception) -> UserError:
    good = newest_good(path)
    use = f"The newest good one is {good}." if good else "There is no good one beside it."
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        what = "it holds more than plain values, and code in a checkpoint is never run"
    return UserError(
        f"Got the checkpoint '{path}', which cannot be read ({what}), expected a whole one, as it was written. {use} Resume "
        "with --ckpt_path and that one."
    )


def newest_good(path: Path) -> Path | None:
    """Return the newest whole checkpoint in the same folder, other than this one."""
    bad = path.resolve()
    found = [p for p in path.parent.glob("*.ckpt") if not p.is_symlink() and p.resolve() != bad]
    for candidate in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            verify(candidate)
            read_header(candidate)
        except (*sharded.READ_ERRORS, UserError):
            continue
        return candidate
    return None
