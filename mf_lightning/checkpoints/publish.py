"""Names of checkpoints: a name is given to a whole checkpoint in one stroke, never to a part of one.

``last.ckpt`` is a link to the newest ``step00000120.ckpt``, a file or a directory; one older checkpoint is kept behind it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

LAST = "last.ckpt"
KEPT = 2
"""Checkpoints ``stepNNNNNNNN.ckpt`` that stay: the one that ``last.ckpt`` names and the one before it."""


def final_path(path: Path, step: int) -> Path:
    """Return where the bytes go: beside the link for ``last.ckpt``, else the path itself."""
    return path.with_name(f"step{step:08d}.ckpt") if path.name == LAST else path


def aside_path(path: Path) -> Path:
    """Return the hidden name under which a checkpoint is written."""
    return path.with_name(f".{path.name}.tmp")


def publish(aside: Path, path: Path, *, step: int) -> None:
    """Give a whole checkpoint its name; ``last.ckpt`` moves to it, and what has become too old goes."""
    final = final_path(path, step)
    if (final.is_dir() and not final.is_symlink()) or (aside.is_dir() and final.exists()):
        discard(final)  # a directory cannot be written over
    os.replace(aside, final)
    if path.name == LAST:
        link = aside_path(path).with_suffix(".link")
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, path)
        flush_folder(path.parent)
        older = sorted(path.parent.glob("step[0-9]*.ckpt"), key=lambda p: p.name)
        later = [p for p in older if p.name > final.name]  # of a run that was cut off, and went on from an earlier one
        for old in [*[p for p in older if p.name <= final.name][:-KEPT], *later]:
            discard(old)
    flush_folder(path.parent)


def discard(path: Path) -> None:
    """Remove a file or directory; a directory loses its name first, so that no part of it is taken for a checkpoint."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Wait until names are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tidy_folder(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for pattern in (".*.ckpt.tmp", ".*.ckpt.old", f".{LAST}.link"):
        for left in folder.glob(pattern):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


def find_last(folder: Path) -> Path | None:
    """Return ``last.ckpt`` of a folder; None if there is none."""
    last = folder / LAST
    return last if last.exists() else None
