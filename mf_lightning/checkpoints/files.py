"""Reading and writing checkpoints: single files, and the doors through which sharded ones are reached as well."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_lightning.checkpoints import sharded
from mf_lightning.checkpoints.publish import aside_path, discard, final_path, publish, tidy_folder
from mf_lightning.types import UserError

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
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        publish(aside, path, step=step)
    except (OSError, RuntimeError) as error:
        raise not_written(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


def not_written(path: Path, error: Exception) -> UserError:
    """Return what to tell a user whose checkpoint could not be written."""
    kept = f"The earlier {path} is still whole." if path.exists() else "Nothing was written."
    return UserError(
        f"Got no checkpoint written to {path} ({error}), expected space for it. {kept} Free some space and resume, "
        "or change trainer.default_root_dir."
    )


def read_checkpoint(path: str | os.PathLike, *, place: Place | None = None, mmap: bool = False) -> dict[str, Any]:
    """Check a checkpoint whole, then read it; no code in it is ever run (``weights_only``).

    Args:
        path: a file, or a directory of shards.
        place: for a sharded network, how each tensor is laid out; None reads every tensor whole, on the CPU.
        mmap: leave a file's tensors on disk until they are used.

    Raises:
        UserError: no such checkpoint, a truncated or altered one, or one that needs code; names the newest good one beside it.
    """
    path = _existing(path)
    try:
        verify(path)
        if path.is_dir():
            return sharded.read(path, place=place)
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


def verify(path: Path) -> None:
    """Compare a checkpoint's bytes with the checksums written with them (CRC-32).

    Raises:
        RuntimeError, OSError, EOFError, zipfile.BadZipFile: it is truncated, altered or no checkpoint.
    """
    if path.is_dir():
        sharded.verify(path)
        return
    with zipfile.ZipFile(path) as archive:  # the form of torch.save, which checks nothing when it loads
        damaged = archive.testzip()
    if damaged is not None:
        raise RuntimeError(f"its record {damaged} was altered")


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
