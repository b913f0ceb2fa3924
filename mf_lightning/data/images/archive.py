"""Images in zip and tar files, read where they lie: nothing is unpacked."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mf_lightning.data.images.labels import LABEL_FILES, find_labels, without_wrapper
from mf_lightning.data.images.source import (
    ImageSource,
    Unreadable,
    check_size,
    ignored_note,
    is_image,
    no_images,
    refuse_doubles,
)
from mf_lightning.types import UserError

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)
_BLOCK = tarfile.BLOCKSIZE


class OpenFiles:
    """Files that are opened on first use and left behind when the owner is sent to another process."""

    def __init__(self, opener: Callable[[Path], Any]) -> None:
        self.opener = opener
        self.lock = threading.Lock()
        self.files: dict[Path, Any] = {}

    def __getitem__(self, path: Path) -> Any:
        with self.lock:
            if path not in self.files:
                self.files[path] = self.opener(path)
            return self.files[path]

    def __reduce__(self) -> tuple:
        return OpenFiles, (self.opener,)


class ZipSource(ImageSource):
    """All images of one zip file, sorted by name. Folders that wrap the whole archive name no class.

    Args:
        path: the file.
        labels: a labels file, "none", or None: a labels file in the archive, or else one class per folder.

    Raises:
        UserError: no zip file, no images, no or wrong labels.
    """

    def __init__(self, path: Path, labels: str | None = None) -> None:
        self.path = path
        self.open_files = OpenFiles(zipfile.ZipFile)
        try:
            archive = self.open_files[path]
        except DAMAGED as error:
            raise damaged(path, error) from error
        found = [member.filename for member in archive.infolist() if not member.is_dir()]
        names, labelled = _list(found, path, labels, self._take)
        self.prefix = labelled.prefix
        super().__init__(names, labelled.numbers, labelled.class_names, labelled.notes)

    def read(self, number: int) -> bytes:
        """Return the member's bytes, never more than it declares."""
        return self._take(self.prefix + self.names[number])

    def _take(self, name: str) -> bytes:
        archive = self.open_files[self.path]
        member = archive.getinfo(name)
        check_size(member.file_size)
        try:
            return archive.read(member)
        except DAMAGED as error:
            raise Unreadable(f"damaged in the zip file ({error})") from error
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or an unknown compression
            raise Unreadable(f"cannot be taken out of the zip file ({error})") from error


@dataclass(frozen=True)
class Member:
    """Where one file of a tar lies."""

    archive: int
    """Number of the tar file."""
    offset: int
    size: int
    plain: bool
    """False for links and sparse files, which have no bytes of their own."""


@dataclass
class TarIndex:
    """The files of several tars, in the order in which they are stored; tars in a tar are opened too."""

    paths: list[Path]
    compressed: bool = False
    names: list[str] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, path in enumerate(self.paths):
            try:
                with tarfile.open(path) as tar:
                    self.compressed |= not isinstance(tar.fileobj, io.BufferedReader)
                    found = list(_members(tar, number, 0))
            except (*DAMAGED, OSError) as error:
                if _is_of_the_disk(error):
                    raise
                raise damaged(path, error) from error
            flat = len(self.paths) > 1 and not any("/" in name for name, _ in found)
            self.names += [f"{path.name.split('.')[0]}/{name}" if flat else name for name, _ in found]
            self.members += [member for _, member in found]


def _members(tar: tarfile.TarFile, number: int, start: int) -> Iterator[tuple[str, Member]]:
    name = ""
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isdir():
            continue
        if member.isreg() and name.endswith(".tar"):  # ImageNet's training images: a tar of one tar per class
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                folder = Path(name).stem
                found = list(_members(inner, number, start + member.offset_data))
            yield from ((f"{folder}/{inner_name}", place) for inner_name, place in found)
        else:
            yield name, Member(number, start + member.offset_data, member.size, member.isreg() and not member.issparse())
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(_BLOCK) != bytes(
        _BLOCK
    ):  # for tarfile, a damaged head and the end of the file are an end like any other
        raise tarfile.ReadError(f"it is damaged or cut off after {name!r}")


def _is_of_the_disk(error: Exception) -> bool:
    """Tell a disk or network that fails from damaged compression, which some modules call an OSError too."""
    return isinstance(error, OSError) and error.errno is not None


class TarReader:
    """Bytes of members: from any thread where the tars are plain, in order where they are compressed."""

    def __init__(self, index: TarIndex) -> None:
        self.paths = index.paths
        self.compressed = index.compressed
        self.open_files = OpenFiles(_open_stream if index.compressed else _open_plain)

    def read(self, member: Member) -> bytes:
        """Return a member's bytes.

        Raises:
            Unreadable: a link, too large, or cut off.
        """
        if not member.plain:
            raise Unreadable("a link or a sparse file in the tar file, which has no bytes of its own")
        check_size(member.size)
        try:
            content = self._take(self.open_files[self.paths[member.archive]], member)
        except (*DAMAGED, OSError) as error:
            if _is_of_the_disk(error):
                raise
            raise Unreadable(f"damaged in the tar file ({_first_line(error)})") from error
        if len(content) != member.size:
            raise Unreadable(f"cut off in the tar file: {len(content):,} of {member.size:,} bytes")
        return content

    def _take(self, file: Any, member: Member) -> bytes:
        if not self.compressed:
            return os.pread(file.fileno(), member.size, member.offset)
        file.seek(member.offset)
        return file.read(member.size)


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _open_stream(path: Path) -> Any:
    return tarfile.open(path).fileobj


class TarSource(ImageSource):
    """All images of tar files with folders (one per class) in them, sorted by name; of compressed tars in the order stored.

    Several tars without folders, or tars in a tar, are a class each: ``n01440764.tar`` holds the images of that class.

    Args:
        index: the tars' files.
        labels: a labels file, "none", or None: a labels file in the tar, or else one class per folder.

    Raises:
        UserError: no images, no or wrong labels.
    """

    def __init__(self, index: TarIndex, labels: str | None = None) -> None:
        where = index.paths[0] if len(index.paths) == 1 else index.paths[0].parent
        self.reader = TarReader(index)
        self.any_order = not index.compressed
        place = dict(zip(index.names, index.members, strict=True))
        order = not index.compressed
        names, labelled = _list(index.names, where, labels, lambda name: self.reader.read(place[name]), in_order=order)
        self.members = [place[labelled.prefix + name] for name in names]
        super().__init__(names, labelled.numbers, labelled.class_names, labelled.notes)

    def read(self, number: int) -> bytes:
        """Return the member's bytes."""
        return self.reader.read(self.members[number])


@dataclass(frozen=True)
class _Labelled:
    prefix: str
    numbers: Any
    class_names: tuple[str, ...]
    notes: list[str]


def _list(
    found: Sequence[str], where: Path, labels: str | None, read: Callable[[str], bytes], in_order: bool = True
) -> tuple[list[str], _Labelled]:
    """Return the images' names below the folders that wrap them, and their labels."""
    images = [name for name in found if is_image(name)]
    if not images:
        raise no_images(where)
    refuse_doubles(images, where)
    prefix = without_wrapper(images)
    tops = [prefix + name for name in LABEL_FILES]
    inside = {} if labels is not None else {n.removeprefix(prefix): _labels_file(n, where, read) for n in found if n in tops}
    names = [name.removeprefix(prefix) for name in (sorted(images) if in_order else images)]
    numbers, class_names, how = find_labels(names, labels, inside, where)
    others = [name for name in found if not is_image(name) and name not in tops]
    return names, _Labelled(prefix, numbers, class_names, [how, *ignored_note(others)])


def _first_line(error: Exception) -> str:
    """Return what an error says, without tarfile's list of the compressions that it tried."""
    return str(error).partition("\n")[0].rstrip(":")


def _labels_file(name: str, where: Path, read: Callable[[str], bytes]) -> bytes:
    try:
        return read(name)
    except Unreadable as error:
        raise UserError(
            f"Got the labels file '{where}/{name}', which cannot be read ({error}), expected a whole one. Correct it, or give "
            "--labels=FILE, or --labels=none for images without classes."
        ) from error


def damaged(path: Path, error: Exception) -> UserError:
    """Return the error for an archive whose list of files cannot be read."""
    kind = "zip" if path.suffix == ".zip" else "tar"
    return UserError(
        f"Got '{path}', whose list of files cannot be read ({_first_line(error)}), expected a whole {kind} file. Copy or "
        "download it again."
    )
