"""The images of an .npz (``arr_0``, uint8, NHWC: ADM's sample batches), read block by block."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mf_lightning.types import UserError

MEMBER = "arr_0.npy"
DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, KeyError, struct.error)
"""What reading a damaged .npz may raise."""


def members(path: Path) -> set[str]:
    """Return the names of an .npz's arrays without reading them.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: it is no such file.
    """
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


class ImageNpz:
    """``arr_0`` of an .npz; nothing is held but the block that is asked for.

    Args:
        path: of the file.

    Raises:
        UserError: no ``arr_0``, or not of uint8 images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        what = "expected uint8 images of shape (N, H, W, 3) or (N, H, W, 1) as arr_0. Give another file."
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(MEMBER) as stream:
                self.shape, fortran, dtype = _header(stream)
                header = stream.tell()
                info = archive.getinfo(MEMBER)
        except DAMAGED as error:
            raise UserError(f"Got '{path}', which cannot be read ({error}), {what}") from error
        if dtype != np.uint8 or fortran or len(self.shape) != 4 or self.shape[-1] not in (1, 3):
            raise UserError(f"Got arr_0 of '{path}' with {dtype}, shape {self.shape}, {what}")
        self.stored = info.compress_type == zipfile.ZIP_STORED
        self._offset = _data_offset(self.path, info) + header if self.stored else header

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield images [first, last) in order, (B, c, H, W) uint8, ``size`` at a time; no last is all.

        Raises:
            UserError: the file is damaged.
        """
        last = len(self) if last is None else last
        row = int(np.prod(self.shape[1:]))
        try:
            with self._opened(first * row) as stream:
                for start in range(first, last, size):
                    count = min(size, last - start)
                    block = stream.read(count * row)
                    if len(block) != count * row:
                        raise EOFError(f"it ends at image {start + len(block) // row:,} of {len(self):,}")
                    pixels = torch.frombuffer(bytearray(block), dtype=torch.uint8).reshape(count, *self.shape[1:])
                    yield pixels.permute(0, 3, 1, 2).contiguous()
        except DAMAGED as error:
            raise UserError(f"Got '{self.path}', which is damaged ({error}), expected a whole file. Copy it again.") from error

    def _opened(self, skip: int) -> BinaryIO:
        """Return a stream that stands ``skip`` bytes behind the header of ``arr_0``."""
        stream = self.path.open("rb") if self.stored else zipfile.ZipFile(self.path).open(MEMBER)  # noqa: SIM115 - closed above
        stream.seek(self._offset + skip)  # a compressed stream is read up to there
        return stream


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether it is in Fortran order, and dtype of an .npy; the stream then stands at its data."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f".npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where a stored member's bytes begin: behind its local header, whose lengths may differ from the directory's."""
    with path.open("rb") as stream:
        stream.seek(info.header_offset)
        fixed = stream.read(30)
    name, extra = struct.unpack("<HH", fixed[26:30])
    return info.header_offset + len(fixed) + name + extra
