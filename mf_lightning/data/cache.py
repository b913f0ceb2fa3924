"""A bounded folder of fetched files that several processes and jobs share.

Every file is named by its checksum. A reader holds a shared lock on the file itself for as long as it is mapped, and no file is
evicted while one is held. Who fetches a file holds the exclusive lock of its name, so that it is fetched once; room is made
under the lock of the whole folder. The kernel gives back the locks of a process that dies.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mf_lightning.data.checksum import stream_checksum
from mf_lightning.types import UserError


class ShardCache:
    """Files by checksum, least recently used evicted first.

    Args:
        folder: on a local disk; made where it is absent.
        limit: bytes that all its files together may take.
        patience: seconds to wait for room while all files are in use.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit: int, *, patience: float = 60.0) -> None:
        self.folder = folder
        self.limit = limit
        self.patience = patience
        self._trusted: set[tuple[str, int]] = set()  # (name, inode) of files whose checksum this process has seen
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            with self._lock("folder"):
                pass
        except OSError as error:
            raise UserError(
                f"Got the cache folder '{folder}', which cannot be written ({error.strerror}), expected one for fetched "
                "shards. Give another data.init_args.cache_dir."
            ) from error

    def open(self, sha256: str, size: int, fetch: Callable[[Callable[[], Path]], Path]) -> BinaryIO:
        """Return the file with this checksum, locked against eviction until it, and all maps of it, are closed.

        Args:
            sha256: checksum, in hexadecimal.
            size: bytes that it is expected to take.
            fetch: is given a function that makes names inside the folder, and returns the one under which the whole file,
                checked, lies; called if it is not here yet.

        Raises:
            UserError: no room, because all files are in use.
        """
        while True:
            stream = self._held(sha256)
            if stream is not None:
                return stream
            with self._lock(sha256):
                if self._file(sha256).exists():
                    continue
                self._make_room(sha256, size)
                try:
                    whole = fetch(lambda: self._aside(sha256, size))
                    inode = os.stat(whole).st_ino
                    os.chmod(whole, 0o444)
                    os.replace(whole, self._file(sha256))
                    self._trusted.add((sha256, inode))
                finally:
                    for left in self.folder.glob(f".{sha256}.*.tmp"):
                        left.unlink(missing_ok=True)

    def _file(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.npy"

    def _aside(self, sha256: str, size: int) -> Path:
        return self.folder / f".{sha256}.{size}.{uuid.uuid4().hex[:12]}.tmp"

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with open(self.folder / "locks" / name, "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _held(self, sha256: str) -> BinaryIO | None:
        """Return the file under a shared lock and marked as used now; None if it is not here, was evicted, or is damaged."""
        file = self._file(sha256)
        try:
            stream = file.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(stream, fcntl.LOCK_SH)
        inode = os.fstat(stream.fileno()).st_ino
        try:
            here = file.stat().st_ino == inode
        except FileNotFoundError:
            here = False
        if here and (sha256, inode) not in self._trusted:
            if stream_checksum(stream) != sha256:
                file.unlink(missing_ok=True)  # damaged on this disk: fetched anew
                here = False
            else:
                self._trusted.add((sha256, inode))
        if not here:
            stream.close()
            return None
        os.utime(stream.fileno())
        stream.seek(0)
        return stream

    def _make_room(self, sha256: str, size: int) -> None:
        """Evict until a file of ``size`` bytes fits, and reserve its room by a name that tells the size."""
        end = time.monotonic() + self.patience
        while True:
            with self._lock("folder"):
                used = self._clear(size)
                if used + size <= self.limit:
                    self._aside(sha256, size).touch()
                    return
            if time.monotonic() > end:
                raise UserError(
                    f"Got a cache of {self.limit / 1e9:.3g} GB in '{self.folder}' with {used / 1e9:.3g} GB in use, expected "
                    f"room for {size / 1e9:.3g} GB more. Raise data.init_args.cache_size, or "
                    "give each job a cache_dir of its own."
                )
            time.sleep(0.1)

    def _clear(self, size: int) -> int:
        """Evict least recently used files until ``size`` more bytes fit; return the bytes that are left in use."""
        promised = {}
        for file in self.folder.glob(".*.tmp"):
            sha256, declared = file.name.split(".")[1:3]
            if self._abandoned(sha256):
                file.unlink(missing_ok=True)
            else:
                promised[sha256] = int(declared)
        files = []
        for file in self.folder.glob("*.npy"):
            with suppress(FileNotFoundError):  # found damaged and removed meanwhile
                files.append((file.stat(), file))
        files.sort(key=lambda pair: pair[0].st_mtime_ns)
        used = sum(promised.values()) + sum(stat.st_size for stat, _ in files)
        for stat, file in files:
            if used + size <= self.limit:
                break
            if self._evict(file):
                used -= stat.st_size
        return used

    def _abandoned(self, sha256: str) -> bool:
        """Tell whether nobody fetches a file (its process was killed)."""
        with open(self.folder / "locks" / sha256, "ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def _evict(self, file: Path) -> bool:
        try:
            stream = file.open("rb")
        except FileNotFoundError:
            return True
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            file.unlink(missing_ok=True)
            return True
