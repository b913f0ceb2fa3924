"""What every source of raw images is to the commands: names, labels and bytes, numbered in a fixed order."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from mf_lightning.types import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_BYTES = 1 << 28
"""A stored image of more bytes (256 MiB) is not read: what claims to hold one is more likely a bomb."""
_OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR}


class Unreadable(ValueError):
    """One image that cannot be read; the message is the reason, the same in every run."""


class ImageSource(ABC):
    """Raw images with labels. Picklable: files are opened on first use, in the process that reads.

    Args:
        names: one per image, unique.
        labels: (N,) int64.
        class_names: empty for images without labels.
        notes: what a person should know of the listing, one line each.
    """

    any_order = True
    """Whether ``read`` is quick in any order and from several threads; else images are read by one thread, in order."""

    def __init__(self, names: list[str], labels: np.ndarray, class_names: tuple[str, ...], notes: Sequence[str]) -> None:
        self.names = names
        self.labels = labels
        self.class_names = class_names
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, number: int) -> bytes:
        """Return the stored bytes of an image.

        Raises:
            Unreadable: this image cannot be read; others may.
            OSError: the disk or the network fails.
        """

    def fingerprint(self) -> str:
        """Return a checksum of names, labels and classes: two listings of one source have the same."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels).tobytes())
        for name in (*self.class_names, "", *self.names):
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()[:16]


def is_image(name: str) -> bool:
    """Tell whether a name is one of an image; hidden files and macOS' shadow files are not."""
    last = name.rsplit("/", 1)[-1]
    return last.lower().endswith(ENDINGS) and not last.startswith(".") and not name.startswith("__MACOSX/")


def read_file(file: Path) -> bytes:
    """Return a file's bytes, with what is wrong with this file alone told from what is wrong with the disk.

    Raises:
        Unreadable: not there, not allowed, too large.
        OSError: anything else.
    """
    try:
        with open(file, "rb", opener=_at_once) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise Unreadable("no regular file, but a pipe or a device")
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            raise Unreadable(f"the file cannot be opened ({error.strerror})") from error
        raise
    check_size(len(content))
    return content


def _at_once(file: str, flags: int) -> int:
    """Open without waiting for somebody who writes into a pipe."""
    return os.open(file, flags | os.O_NONBLOCK)


def check_size(size: int) -> None:
    """Refuse an image that claims more than ``MAX_BYTES``.

    Raises:
        Unreadable: it does.
    """
    if size > MAX_BYTES:
        raise Unreadable(f"more than {MAX_BYTES:,} bytes")


def ignored_note(names: Sequence[str]) -> list[str]:
    """Return the line about files that are no images, if there are any."""
    return [f"{len(names):,} other file(s) are no images and were left out, the first is {min(names)!r}"] if names else []


def refuse_doubles(names: Sequence[str], where: object) -> None:
    """Refuse two images of one name: neither a label nor a list could tell them apart.

    Raises:
        UserError: naming the first.
    """
    if len(set(names)) != len(names):
        ordered = sorted(names)
        twice = next(one for one, other in pairwise(ordered) if one == other)
        raise UserError(f"Got two images named {twice!r} in '{where}', expected each name once. Rename or remove one.")


def no_images(where: object) -> UserError:
    """Return the error for a source without a single image."""
    return UserError(
        f"Got '{where}' without a single image, expected files that end in {', '.join(ENDINGS)}, "
        "or .tar, .zip or .parquet files of images. Give another SOURCE."
    )
