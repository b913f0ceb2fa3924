"""Plain numpy files: ``latents.npy`` beside ``labels.npy``, or both in one ``.npz`` file.

Names: ``*latents.npy`` or ``*moments.npy``, (N, C, h, w), with ``*labels.npy``, (N,), and maybe ``*latents_flip.npy`` or
``*moments_flip.npy`` of the mirrored pictures, where * is the same for all; in an .npz file the arrays have these names
without *. Values must be unscaled, as the autoencoder gives them. Order: sorted file names, then rows.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from mf_lightning.data.foreign.source import DAMAGE, Holds, RowFiles, Rows, check_sample, load_npy, unreadable
from mf_lightning.data.walk import check_link
from mf_lightning.types import UserError

NAMES = ("latents", "moments")
FLIPPED = tuple(f"{name}_flip" for name in NAMES)


class ArraySource(RowFiles):
    """Arrays with many samples each; .npy files are mapped, of .npz files one is in memory.

    Args:
        path: a folder of files, or one .npz file, or one .npy file with its labels beside it.
        holds: what the arrays hold.
        follow_links: also take what symbolic links out of the folder point to.

    Raises:
        UserError: arrays without labels, of unlike length, or of another shape.
    """

    layout = "*latents.npy or *moments.npy beside *labels.npy, or .npz files with such arrays"

    def __init__(self, path: Path, holds: Holds | None, follow_links: bool = False) -> None:
        assert holds is not None, "open_source asks for it"
        self.holds = holds
        files = _files(path)
        folder = path if path.is_dir() else path.parent
        for part in (part for file in files for part in (file, *_beside(file)) if part != path and os.path.lexists(part)):
            check_link(part, folder, follow_links=follow_links)
        first = _open(files[0])
        if not len(first.stored):
            raise UserError(f"Got no samples in '{files[0]}', expected some. Remove the file.")
        check_sample(first.stored[0], f"'{files[0]}'")
        self.shape, self.dtype, self.flip = first.stored.shape[1:], first.stored.dtype, first.flipped is not None
        super().__init__(files[:1], [len(first.stored)])  # names the first sample, for messages
        super().__init__(files, [self._count(file) for file in files])  # one file is open at a time

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Look for the names."""
        return bool(_files(path))

    def read(self, index: np.ndarray) -> Rows:
        """Copy rows, file by file."""
        stored = np.empty((len(index), *self.shape), self.dtype)
        flipped = np.empty_like(stored) if self.flip else None
        labels = np.empty(len(index), np.int64)
        for file, here, rows in self.by_file(index):
            opened = _open(file)
            stored[here], labels[here] = opened.stored[rows], opened.labels[rows]
            if flipped is not None:
                flipped[here] = opened.flipped[rows]
        return Rows(stored, labels, flipped)

    def _count(self, file: Path) -> int:
        rows, wrong = _open(file), None
        self.check_like_first(rows.stored.shape[1:], rows.stored.dtype, f"'{file}'")
        if rows.labels.shape != rows.stored.shape[:1] or rows.labels.dtype.kind not in "iu":
            wrong = f"labels {rows.labels.shape} of {rows.labels.dtype}"
        elif (rows.flipped is not None) != self.flip:
            wrong = "a mirrored copy in some files only"
        elif rows.flipped is not None and (rows.flipped.shape, rows.flipped.dtype) != (rows.stored.shape, rows.stored.dtype):
            wrong = f"a mirrored copy {rows.flipped.shape} of {rows.flipped.dtype}"
        if wrong:
            raise UserError(
                f"Got {wrong} for '{file}' with {rows.stored.shape} values of {rows.stored.dtype}, expected a whole number for "
                "each of its samples and, in all files or none, a mirrored copy just like it. Correct the files."
            )
        return len(rows.stored)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".npz" or _is_latents(path) else []
    found = sorted(file for file in path.glob("*.np[yz]") if not file.name.startswith("."))
    return [file for file in found if file.suffix == ".npz" or _is_latents(file)]


def _beside(file: Path) -> list[Path]:
    """Return the files of labels and of mirrored copies that belong to a .npy file."""
    name = next((name for name in NAMES if _is_latents(file) and file.stem.endswith(name)), None)
    stem = file.stem.removesuffix(name or "")
    return [file.with_name(f"{stem}{end}.npy") for end in ("labels", f"{name}_flip")] if name else []


def _is_latents(file: Path) -> bool:
    return file.suffix == ".npy" and file.stem.endswith(NAMES)


@lru_cache(maxsize=1)
def _open_npz(file: Path) -> Rows:
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content if name in {*NAMES, *FLIPPED, "labels"}}
    except DAMAGE as error:
        raise unreadable(file, error) from error
    name = next((name for name in NAMES if name in arrays), None)
    if name is None or "labels" not in arrays:
        raise UserError(f"Got no labels or none of {', '.join(NAMES)} in '{file}', expected both. Rename its arrays.")
    return Rows(arrays[name], arrays["labels"], arrays.get(f"{name}_flip"))


def _open(file: Path) -> Rows:
    if file.suffix == ".npz":
        return _open_npz(file)
    labels, flipped = _beside(file)
    if not labels.is_file():
        raise UserError(f"Got '{file}' without '{labels.name}' beside it, expected the labels there. Add them.")
    mirrored = load_npy(flipped, mmap=True) if flipped.is_file() else None
    return Rows(load_npy(file, mmap=True), load_npy(labels), mirrored)
