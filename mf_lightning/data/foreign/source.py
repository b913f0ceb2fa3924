"""What is asked of another project's latents, whatever their layout."""

from __future__ import annotations

import hashlib
import pickle
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mf_lightning.data.walk import walk_files
from mf_lightning.types import UserError

Holds = Literal["mean_std", "mean_logvar", "latents"]
"""What the files hold: moments of the posterior, stacked along channels, or one draw of it."""

DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What the readers of numpy, torch, zipfile and pickle raise for damaged bytes; caught around calls of theirs only."""

THREADS = 8
"""Small files read at once: on a network file system the wait is for each file's opening."""


@dataclass(frozen=True)
class Facts:
    """What the files do not tell, and the project that wrote them fixes."""

    autoencoder: str
    scale: float
    shift: float
    factor: int
    """Pixels along a side for each latent."""


@dataclass(frozen=True)
class Rows:
    """Some samples, as they are stored."""

    stored: np.ndarray
    """(n, C', h, w), C' = 2C for moments."""
    labels: np.ndarray
    """(n,) int64."""
    flipped: np.ndarray | None
    """As ``stored``, of the mirrored pictures."""


class Source(ABC):
    """Samples in a fixed order, read by their numbers; nothing but names is kept in memory."""

    layout: ClassVar[str]
    """The files in a few words, for messages."""
    holds: Holds
    facts: ClassVar[Facts | None] = None
    """None where the project leaves the choice to its user."""
    class_names: tuple[str, ...] | None = None
    """None where the files do not tell them."""
    flip: bool = False
    """Whether there is a copy of the mirrored pictures."""
    shape: tuple[int, ...]
    """(C', h, w) of every sample."""
    dtype: np.dtype
    """Of every sample."""

    @classmethod
    @abstractmethod
    def fits(cls, path: Path) -> bool:
        """Tell from a few names whether the files are of this layout."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def name(self, number: int) -> str:
        """Return where a sample lies, for messages."""

    @abstractmethod
    def read(self, index: np.ndarray) -> Rows:
        """Return samples by their numbers, (n,)."""

    @abstractmethod
    def contents(self) -> Iterator[str]:
        """Yield what tells these samples from others: names below the source's folder, labels that are known."""

    def fingerprint(self) -> str:
        """Return a checksum of shape, dtype and contents: an adoption that was cut off goes on only with the same one."""
        digest = hashlib.sha256(f"{self.shape} {self.dtype}".encode())
        for content in self.contents():
            digest.update(content.encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()

    def check_like_first(self, shape: tuple[int, ...], dtype: np.dtype, where: str) -> None:
        """Refuse a sample of another shape or dtype than the first.

        Raises:
            UserError: naming it.
        """
        if shape != self.shape or dtype != self.dtype:
            raise UserError(
                f"Got {shape} values of {dtype} in {where}, expected {self.shape} of {self.dtype} as in {self.name(0)}: a data "
                "set has one shape. Adopt the others apart, or remove them."
            )


class FilePerSample(Source):
    """A layout with a file for each sample.

    Args:
        root: folder that the names are relative to.
        files: names in order, at least one.
    """

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root, self.files = root, files
        first, _, flipped = self.read_file(0)
        check_sample(first, self.name(0))
        self.shape, self.dtype, self.flip = first.shape, first.dtype, flipped is not None

    @abstractmethod
    def read_file(self, number: int) -> tuple[np.ndarray, int, np.ndarray | None]:
        """Return the latents, the label, and the mirrored latents or None, of one sample."""

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        """Return the file."""
        return f"'{self.root / self.files[number]}'"

    def contents(self) -> Iterator[str]:
        """Yield the names of the files."""
        yield from self.files

    def read(self, index: np.ndarray) -> Rows:
        """Read some files, several at once."""
        stored = np.empty((len(index), *self.shape), self.dtype)
        flipped = np.empty_like(stored) if self.flip else None
        labels = np.empty(len(index), np.int64)

        def fill(row: int) -> None:
            latents, label, mirrored = self.read_file(int(index[row]))
            where = self.name(int(index[row]))
            self.check_like_first(latents.shape, latents.dtype, where)
            stored[row], labels[row] = latents, label
            if flipped is not None:
                self.check_like_first(mirrored.shape, mirrored.dtype, f"the mirrored copy of {where}")
                flipped[row] = mirrored

        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(fill, range(len(index))):
                pass
        return Rows(stored, labels, flipped)


class RowFiles(Source):
    """A layout with files of many samples each.

    Args:
        files: in order.
        counts: samples of each.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int]) -> None:
        self.files = files
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, number: int) -> str:
        """Return file and row."""
        file = int(np.searchsorted(self.starts, number, side="right")) - 1
        return f"'{self.files[file]}', row {number - self.starts[file]}"

    def contents(self) -> Iterator[str]:
        """Yield files and where they end."""
        return (f"{file.name} {end}" for file, end in zip(self.files, self.starts[1:], strict=True))

    def by_file(self, index: np.ndarray) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
        """Yield each file that holds some of the samples, their places in ``index``, and their rows in the file."""
        file_of = np.searchsorted(self.starts, index, side="right") - 1
        for number in np.unique(file_of):
            here = np.flatnonzero(file_of == number)
            yield self.files[number], here, index[here] - self.starts[number]


def check_sample(array: np.ndarray, where: str) -> None:
    """Refuse a first sample that is no picture of numbers.

    Raises:
        UserError: naming it.
    """
    if array.ndim != 3 or array.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(
            f"Got {array.shape} values of {array.dtype} in {where}, expected (channels, height, width) of float16, float32 or "
            "float64. Check KIND and SOURCE."
        )


def files_below(root: Path, ending: str, *, follow_links: bool, within: Path | None = None, deep: bool = True) -> Iterator[str]:
    """Yield the names of files with an ending, relative to a folder, in no order; hidden files and folders are left out.

    Arguments as in ``walk_files``.
    """
    for name in walk_files(root, follow_links=follow_links, within=within, deep=deep):
        if name.endswith(ending) and not any(part.startswith(".") for part in name.split("/")):
            yield name


def has_file(root: Path, ending: str, *, deep: bool = True) -> bool:
    """Tell whether there is a file with an ending in a folder; whoever reads it refuses links out of the folder."""
    return root.is_dir() and next(files_below(root, ending, follow_links=True, deep=deep), None) is not None


def load_npy(file: Path, *, mmap: bool = False) -> np.ndarray:
    """Return the array of a .npy file; pickled objects are refused.

    Raises:
        UserError: truncated, or no array.
    """
    try:
        return np.load(file, mmap_mode="r" if mmap else None, allow_pickle=False)
    except DAMAGE as error:
        raise unreadable(file, error) from error


def unreadable(where: Path | str, error: BaseException) -> UserError:
    """Return the message for a file that its format's reader refuses."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    name = f"'{where}'" if isinstance(where, Path) else where
    return UserError(
        f"Got {name}, which cannot be read ({reason}), expected a whole file of numbers; code in it is never run. It may be "
        "truncated: copy it once more, or remove it and its label."
    )


def whole_label(value: Any, where: str) -> int:
    """Return a label as an integer.

    Raises:
        UserError: it is not one whole number.
    """
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise UserError(f"Got the label {value!r} of {where}, expected one whole number. Correct the labels.")
    return int(array.reshape(()))
