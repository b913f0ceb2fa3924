"""Names of checkpoints: a name is given to a whole checkpoint in one stroke, never to a part of one.

``last.ckpt`` is a link to the newest ``step00000120.ckpt``, a file or a directory; one older checkpoint is kept behind it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

LAST = "last.ckpt"
_STATE = re.compile(r"step(\d{8,})b?\.ckpt")
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
    if path.name != LAST:
        _replace(aside, path)
        flush_folder(path.parent)
        return
    final = _free_name(aside, path, step)
    os.replace(aside, final)
    link = aside_path(path).with_suffix(".link")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, path)
    flush_folder(path.parent)
    found = sorted((int(match[1]), p) for p in path.parent.iterdir() if (match := _STATE.fullmatch(p.name)) and p != final)
    older, same = [p for n, p in found if n < step], [p for n, p in found if n == step]
    for old in [*older[: max(0, len(older) - KEPT + 1)], *same]:  # later ones stay until this run has passed them
        discard(old)
    flush_folder(path.parent)


def _free_name(aside: Path, last: Path, step: int) -> Path:
    """Return a name for the bytes behind ``last.ckpt``: a directory cannot take the place of the one that the link names."""
    final = final_path(last, step)
    if not aside.is_dir() and not final.is_dir():
        return final
    if os.path.lexists(last) and last.resolve().name == final.name:
        final = final.with_name(f"step{step:08d}b.ckpt")
    if os.path.lexists(final):
        discard(final)
    return final


def _replace(aside: Path, path: Path) -> None:
    """Put a file or directory in the place of what has the name; :func:`tidy_folder` mends a kill in between."""
    before = path.with_name(f".{path.name}.before")
    if path.is_dir() or (aside.is_dir() and path.exists()):
        os.replace(path, before)
    os.replace(aside, path)
    if before.exists():
        discard(before)


def discard(path: Path) -> None:
    """Remove a file or directory; a directory loses its name first, so that no part of it is taken for a checkpoint."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name.removeprefix('.')}.old")
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
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot do it for folders
            raise
    finally:
        os.close(handle)


def tidy_folder(folder: Path) -> None:
    """Remove what a killed run left half written, and give back the name of what it was about to replace."""
    for before in folder.glob(".*.ckpt.before"):
        path = before.with_name(before.name[1 : -len(".before")])
        if path.exists():
            discard(before)
        else:
            os.replace(before, path)
    for left in folder.iterdir():
        if re.fullmatch(rf"\..*\.ckpt\.(tmp|(.*\.)?old)|\.{LAST}\.link", left.name):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


def find_last(folder: Path) -> Path | None:
    """Return ``last.ckpt`` of a folder; None if there is none."""
    last = folder / LAST
    return last if last.exists() else None
