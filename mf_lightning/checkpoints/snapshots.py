"""Snapshots of power-function averages: one safetensors file per step and width, from which other widths are put together."""

from __future__ import annotations

import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_lightning.checkpoints.publish import aside_path, publish
from mf_lightning.types import UserError

FOLDER = "snapshots"
_NAME = re.compile(r"step(\d{8,})_sigma(0\.\d{3})\.safetensors")
_LEFT = re.compile(rf"\.{_NAME.pattern}\.tmp")
_HEADER, _FORMAT = "snapshot", 1


@dataclass(frozen=True)
class Header:
    """What a snapshot tells of itself, besides its tensors."""

    step: int
    """Optimizer steps behind it."""
    sigma_rel: float
    """Width of its profile."""
    run: str
    """Checksum of the run's first snapshot: the same in all of a run, also over resumes."""
    net: dict[str, Any]
    """Class and settings of the network."""
    data: dict[str, Any]
    """The data set's description."""
    fm_fraction: float
    """Of the loss; 1 is flow matching."""
    kept: tuple[str, ...]
    """Tensors that are no averages: buffers, and parameters that are not trained."""
    crc32: str
    """Of all tensors' bytes, in the order of their names."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on disk."""

    path: Path
    header: Header


def snapshot_path(folder: Path, step: int, sigma_rel: float) -> Path:
    """Return the name of a snapshot; it tells a width to three decimals."""
    return folder / f"step{step:08d}_sigma{sigma_rel:.3f}.safetensors"


def checksum(tensors: dict[str, Tensor]) -> str:
    """Return the CRC-32 of tensors' bytes in the order of their names, as 8 hex digits."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def write_snapshot(folder: Path, tensors: dict[str, Tensor], header: Header) -> None:
    """Write a snapshot aside, flush it to disk, then give it its name.

    Raises:
        UserError: the disk is full or not writable; no part of a snapshot is left.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = snapshot_path(folder, header.step, header.sigma_rel)
    aside = aside_path(path)
    content = json.dumps({"format_version": _FORMAT, **asdict(header)}, sort_keys=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside, metadata={_HEADER: content})
        with aside.open("rb+") as stream:
            os.fsync(stream.fileno())
        publish(aside, path, step=header.step)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Got no snapshot written to {path} ({error}), expected space for it. Free some and resume, write fewer with "
            "phema.snapshot_every, or smaller ones with phema.dtype=float16."
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def set_aside(folder: Path) -> Path | None:
    """Move all snapshots into a new folder inside theirs, and return it: a run that begins is not the one that made them."""
    paths = [path for path in sorted(folder.iterdir()) if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    if not paths:
        return None
    aside = next(place for n in itertools.count(1) if not (place := folder / f"earlier-{n}").exists())
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    return aside


def drop_later(folder: Path, step: int, run: str | None = None) -> int:
    """Remove snapshots of steps after ``step``, and what a kill left half written; return how many were removed.

    A run that goes on from ``step`` makes them again, to the last bit or, from another state, as they ought to be.

    Args:
        folder: of the snapshots.
        step: that the run goes on from.
        run: its name; None if it has not written any.

    Raises:
        UserError: another run's are among them.
    """
    later = [path for path in sorted(folder.iterdir()) if _is_later(path, step)] if folder.is_dir() else []
    for path in later:
        if run is not None and (other := _run_of(path)) not in (None, run):
            raise UserError(
                f"Got {path}, a snapshot of another run ({other}, not {run}), expected only this run's. Give this run a folder "
                "of its own: --phema.folder."
            )
    removed = 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path in later:
            path.unlink()
            removed += 1
        elif _LEFT.fullmatch(path.name):
            path.unlink()
    return removed


def _is_later(path: Path, step: int) -> bool:
    match = _NAME.fullmatch(path.name)
    return match is not None and int(match[1]) > step


def _run_of(path: Path) -> str | None:
    """Return the run that a snapshot names; None of one that was cut off."""
    try:
        return _read_header(path).run
    except UserError:
        return None


def list_snapshots(folder: Path) -> list[Snapshot]:
    """Return the snapshots of a run by step and width; their tensors are not read.

    Args:
        folder: of snapshots.

    Raises:
        UserError: there are none, one cannot be read, or they are of several runs.
    """
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    if not paths:
        raise UserError(
            f"Got no snapshots in {folder}, expected those of a run: averages cannot be told from its checkpoints afterwards. "
            "Train with --phema.snapshot_every=N, for example a fiftieth of the steps."
        )
    found = sorted((Snapshot(path, _read_header(path)) for path in paths), key=lambda s: (s.header.step, s.header.sigma_rel))
    first = found[0]
    for each in found[1:]:
        for what in ("run", "net", "kept"):
            if getattr(each.header, what) != getattr(first.header, what):
                raise UserError(
                    f"Got snapshots of several runs in {folder} ({first.path.name} and {each.path.name} differ in their "
                    f"{what}), expected one run's. Move those of other runs to folders of their own."
                )
    return found


def _read_header(path: Path) -> Header:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[_HEADER])
        if content.pop("format_version") != _FORMAT:
            raise ValueError("another version of mf_lightning wrote it")
        header = Header(**{**content, "kept": tuple(content["kept"])})
        if snapshot_path(path.parent, header.step, header.sigma_rel) != path:
            raise ValueError(f"it is of step {header.step} and width {header.sigma_rel}: it was renamed")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"no entry {error}" if isinstance(error, KeyError) else str(error)) from error
    return header


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"Got the snapshot {path}, which is damaged ({reason.splitlines()[0]}), expected it whole, as the run wrote it. "
        "Copy it again, or remove it: fewer snapshots do too, with a larger error."
    )


def read_snapshot(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return a snapshot's tensors, all on the CPU.

    Raises:
        UserError: its bytes do not have its checksum, or it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(snapshot.path)
    except (OSError, SafetensorError) as error:
        raise _damaged(snapshot.path, str(error)) from error
    if checksum(tensors) != snapshot.header.crc32:
        raise _damaged(snapshot.path, "its bytes do not have its checksum")
    return tensors


def combine(snapshots: Sequence[Snapshot], factors: Iterable[float]) -> dict[str, Tensor]:
    """Return the sum of snapshots times factors, summed in float64 and given in float32; what is no average is the newest's.

    One snapshot is in memory at a time.

    Raises:
        UserError: one is damaged, or holds other tensors than the others.
    """
    sums: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for snapshot, factor in zip(snapshots, factors, strict=True):
        if factor == 0:
            continue
        tensors = read_snapshot(snapshot)
        kept = {name: tensors.pop(name) for name in snapshot.header.kept if name in tensors}
        shapes = {name: value.shape for name, value in tensors.items()}
        if sums and shapes != {name: value.shape for name, value in sums.items()}:
            raise _damaged(snapshot.path, "it holds other tensors than the others")
        for name, value in tensors.items():
            if name in sums:
                sums[name].add_(value, alpha=factor)  # value is widened first
            else:
                sums[name] = value.double() * factor
    return {**{name: value.float() for name, value in sums.items()}, **kept}
