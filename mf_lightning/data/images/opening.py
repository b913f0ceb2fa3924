"""Which kind of source a path is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mf_lightning.data.images.archive import TarIndex, TarSource, ZipSource
from mf_lightning.data.images.folder import FolderSource
from mf_lightning.data.images.labels import SPLITS
from mf_lightning.data.images.parquet import ParquetSource
from mf_lightning.data.images.source import ImageSource, is_image
from mf_lightning.data.images.webdataset import WebDatasetSource, is_webdataset
from mf_lightning.types import UserError

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_WHAT = "a folder of images, a .zip, .tar or .parquet file, a folder of those, or a pattern such as 'data/train-*.parquet'"


def open_images(source: str | Path, *, labels: str | None = None, follow_links: bool = False) -> ImageSource:
    """Return the images at a path, listed and labelled.

    Args:
        source: folder by class, folder with a labels file, zip or tar files, WebDataset tars, parquet files; or a pattern.
        labels: a labels file, "none" for images without classes, or None for the source's own.
        follow_links: also take what symbolic links out of a folder point to.

    Raises:
        UserError: no such path, an unknown kind, or what the kinds refuse.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = _archives(path)
        return _of_files(files, labels, path) if files else FolderSource(path, labels, follow_links)
    if path.is_file():
        return _of_files([path], labels, path)
    files = sorted(file for file in path.parent.glob(path.name) if file.is_file()) if path.parent.is_dir() else []
    if not files:
        raise UserError(f"Got SOURCE = '{source}', which does not exist, expected {_WHAT}. Give another path.")
    return _of_files(files, labels, path)


def _archives(folder: Path) -> list[Path]:
    """Return the zip, tar or parquet files of a folder (or of its folder ``data``, as on the Hugging Face hub), sorted."""
    for place in (folder, folder / "data"):
        if place.is_dir():
            found = sorted(file for file in place.iterdir() if _kind(file) and file.is_file())
            if found:
                _refuse_images(place, found[0])
                return found
    return []


def _refuse_images(folder: Path, archive: Path) -> None:
    """Refuse a folder of archives that also holds images: which of them are meant, nobody told."""
    beside = (os.path.join(top, name) for top, _, names in os.walk(folder) for name in sorted(names) if is_image(name))
    first = next(beside, None)
    if first is not None:
        raise UserError(
            f"Got '{folder}' with both images ({os.path.relpath(first, folder)!r}) and archives of them ({archive.name!r}), "
            f"expected one kind. Give a pattern such as '{folder}/*{archive.suffix}', or move one kind elsewhere."
        )


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    if name.startswith("."):
        return None
    return next((kind for kind, ends in (("tar", TAR), ("zip", ".zip"), ("parquet", ".parquet")) if name.endswith(ends)), None)


def _of_files(files: Sequence[Path], labels: str | None, where: Path) -> ImageSource:
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise UserError(f"Got '{where}' with {', '.join(file.name for file in files[:3])}, expected {_WHAT}, all of one kind.")
    _refuse_several_splits(files, where)
    kind = kinds.pop()
    if kind == "parquet":
        return ParquetSource(list(files), labels)
    if kind == "zip":
        if len(files) > 1:
            raise UserError(f"Got {len(files)} zip files in '{where}', expected one. Give the path of one.")
        return ZipSource(files[0], labels)
    index = TarIndex(list(files))
    return WebDatasetSource(index, labels) if is_webdataset(index.names) else TarSource(index, labels)


def _refuse_several_splits(files: Sequence[Path], where: Path) -> None:
    """Training and validation files lie side by side on the hub; to encode them as one split would spoil both."""
    splits = sorted({split for file in files if (split := _split_of(file.name)) is not None})
    if len(splits) > 1:
        raise UserError(
            f"Got '{where}' with files of several splits ({', '.join(splits)}), expected those of one. Give a pattern, "
            f"'{files[0].parent}/*{splits[0]}*', and the other with --val_source."
        )


def _split_of(name: str) -> str | None:
    """Return the split that a file's name tells: "train-00000-of-00004.parquet", "imagenet1k-validation-07.tar"."""
    if found := re.fullmatch(r"(\w+)-\d+-of-\d+(-\w+)?\.\w+", name):
        return found[1]
    return next((word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS), None)
