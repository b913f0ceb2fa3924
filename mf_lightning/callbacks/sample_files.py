"""Where exported samples go: a folder of PNGs, or the .npz that ADM's evaluator reads; whole files only."""

from __future__ import annotations

import os
import shutil
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from mf_lightning.sheet import to_picture

NPZ_FILE = "samples.npz"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_THREADS = 8


class SampleFiles(Protocol):
    """Images by number, written by any number of processes to one folder."""

    def present(self, count: int) -> np.ndarray:
        """Tell which of ``count`` images are there, whole, (count,) bool."""
        ...

    def write(self, pixels: Tensor, first: int, present: np.ndarray) -> None:
        """Begin to write images ``first``, ``first + 1``, ..., (B, c, H, W) uint8, those that are not present."""
        ...

    def flush(self) -> None:
        """Wait until all that was begun is written."""
        ...

    def finish(self, count: int, labels: np.ndarray | None) -> str:
        """Make the result of all images, on one process, and return what it is, in words."""
        ...

    def remove(self) -> None:
        """Remove all images."""
        ...


class PngFiles:
    """``000000.png``, ``000001.png``, ...: grey pictures as grey PNGs, encoded by threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: list[list[Future]] = []

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"

    def present(self, count: int) -> np.ndarray:
        """Tell which images are there, from the last bytes of their files."""
        names = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        found = [f"{number:06d}.png" in names and _is_whole(self._file(number)) for number in range(count)]
        return np.array(found, bool)

    def write(self, pixels: Tensor, first: int, present: np.ndarray) -> None:
        """Begin to write images; at most two batches wait."""
        self._pool = self._pool or ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "png")
        pictures = pixels.cpu()
        numbers = [number for number in range(first, first + len(pictures)) if not present[number]]
        self._waiting.append([self._pool.submit(self._save, pictures[n - first], n) for n in numbers])
        while len(self._waiting) > 2:
            _wait(self._waiting.pop(0))

    def _save(self, picture: Tensor, number: int) -> None:
        file = self._file(number)
        aside = aside_of(file)
        to_picture(picture).save(aside, format="PNG")
        aside.replace(file)

    def flush(self) -> None:
        """Wait for all files."""
        while self._waiting:
            _wait(self._waiting.pop(0))
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def finish(self, count: int, labels: np.ndarray | None) -> str:
        """Return what was written."""
        with Image.open(self._file(0)) as first:
            return f"PNGs of {first.width} x {first.height} pixels, {'grey' if first.mode == 'L' else first.mode}"

    def remove(self) -> None:
        """Remove the PNGs that have a number for a name."""
        for file in self.folder.glob("[0-9]*.png"):
            if file.stem.isdecimal():
                file.unlink()


class NpzFiles:
    """``samples.npz``: ``arr_0`` (N, H, W, 3) uint8 and, of labelled images, ``arr_1`` (N,) int64, as ADM's sample batches.

    Each batch is a part of its own, ``.parts/00000000-00000063.npy``, until one process joins them, a part in memory at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts, self.file = folder, folder / ".parts", folder / NPZ_FILE
        self._grey = False

    def _listed(self) -> list[tuple[int, int, Path]]:
        """Return first and last number and file of each part, sorted."""
        found = []
        for file in self.parts.glob("*-*.npy"):
            first, _, last = file.stem.partition("-")
            found.append((int(first), int(last), file))
        return sorted(found)

    def present(self, count: int) -> np.ndarray:
        """Tell which images are in the result or in a part."""
        found = np.full(count, self.file.exists())
        for first, last, _ in self._listed():
            found[first : last + 1] = True
        return found

    def write(self, pixels: Tensor, first: int, present: np.ndarray) -> None:
        """Write the images as a part."""
        self.parts.mkdir(parents=True, exist_ok=True)
        rgb = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        file = self.parts / f"{first:08d}-{first + len(rgb) - 1:08d}.npy"
        aside = aside_of(file)
        with aside.open("wb") as stream:
            np.save(stream, rgb)
        aside.replace(file)

    def flush(self) -> None:
        """Nothing waits."""

    def finish(self, count: int, labels: np.ndarray | None) -> str:
        """Join the parts; the bytes are those that every way of making the images gives."""
        if not self.file.exists():
            aside = aside_of(self.file)
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
                    self._join(stream, count)
                if labels is not None:
                    with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, labels, version=(1, 0))
            aside.replace(self.file)
        shutil.rmtree(self.parts, ignore_errors=True)
        return f"{NPZ_FILE} of {self.file.stat().st_size / 1e6:,.1f} MB (arr_0 uint8 NHWC, grey repeated to RGB)"

    def _join(self, stream: Any, count: int) -> None:
        listed, position = self._listed(), 0
        shape = (count, *np.load(listed[0][2], mmap_mode="r").shape[1:])
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for first, last, file in listed:
            if last < position:
                continue  # another batch size was used before; these images are there already
            assert first <= position, "no image is missing"
            stream.write(np.load(file)[position - first :].tobytes())
            position = last + 1
        assert position == count, "no image is missing"

    def remove(self) -> None:
        """Remove the result and its parts."""
        self.file.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)


def aside_of(file: Path) -> Path:
    """Return the name under which a file is written until it is whole."""
    host = os.uname().nodename if hasattr(os, "uname") else ""
    return file.with_name(f".{file.name}.{host}.{os.getpid()}.tmp")


def _is_whole(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - len(_PNG_END)))
        return stream.read() == _PNG_END


def _wait(writes: list[Future]) -> None:
    for write in writes:
        write.result()
