"""Files behind a URL, through fsspec: fetched whole, again where a connection fails, and checked before anybody sees them."""

from __future__ import annotations

import errno
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from mf_lightning.data.checksum import file_checksum
from mf_lightning.data.shards import INFO_FILE, DatasetInfo, parse_info
from mf_lightning.types import UserError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
FIRST_DELAY = 0.5
"""Seconds before the first repetition; doubled for each further one, up to 30."""
LEAST_PROGRESS = 1 << 16
"""Bytes that must arrive within a timeout; a connection that brings fewer counts as dead."""
_LOG = logging.getLogger(__name__)


class RemoteFolder:
    """A data set's folder behind a URL.

    Args:
        url: of the folder, in any protocol that fsspec knows.
        storage_options: of its file system, as fsspec takes them.
        retries: how often a file is fetched again after a failure.
        timeout: seconds without progress after which a connection is given up.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any], *, retries: int, timeout: float) -> None:
        import fsspec

        protocol = url.split("://")[0]
        options = dict(storage_options)
        if protocol in ("http", "https") and "client_kwargs" not in options:
            import aiohttp  # its own limit is five minutes for a file, however well it comes

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)}
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            package = PACKAGES.get(protocol, f"fsspec's package for {protocol}://")
            raise UserError(f"Got the URL '{url}', expected {package} to read it ({error}). pip install {package}") from error
        except (ValueError, TypeError) as error:
            raise UserError(
                f"Got the URL '{url}', which cannot be opened ({error}), expected a protocol that fsspec knows, such as s3://, "
                "gs://, hf:// or https://, and its storage_options. Correct data.init_args.path or storage_options."
            ) from error
        self.url = url.rstrip("/")
        self.retries = retries
        self.timeout = timeout

    def read_info(self) -> DatasetInfo:
        """Return what the data set says of itself.

        Raises:
            UserError: there is none, it cannot be fetched or read.
        """
        with tempfile.TemporaryDirectory() as folder:
            names = iter(range(self.retries + 1))
            file = self._tried(INFO_FILE, lambda: Path(folder) / str(next(names)), check=lambda file: None, most=1 << 28)
            return parse_info(file.read_text(errors="replace"), where=f"{self.url}/{INFO_FILE}")

    def fetch(self, name: str, new_file: Callable[[], Path], *, sha256: str, size: int) -> Path:
        """Return the local path of a fetched file whose checksum is right.

        Args:
            name: of the file, below the folder.
            new_file: makes a new local name for each attempt, so that a given-up connection cannot write into the next file.
            sha256: checksum, in hexadecimal.
            size: bytes that the array in it takes.

        Raises:
            UserError: it is not there, was altered, or could not be fetched in so many attempts.
        """
        wrong = []

        def check(file: Path) -> str | None:
            got = file.stat().st_size
            if got < size:
                return f"it ended after {got:,} of {size:,} bytes"
            found = file_checksum(file)
            if found == sha256:
                return None
            wrong.append(found)
            if len(wrong) > 1:
                raise UserError(
                    f"Got checksum {found} of '{self.url}/{name}', fetched twice, expected {sha256}: the file was altered or "
                    "damaged where it lies. Put the right file there, or prepare the data set again."
                )
            return "its checksum is wrong"

        return self._tried(name, new_file, check=check, most=size + LEAST_PROGRESS)

    def _tried(self, name: str, new_file: Callable[[], Path], *, check: Callable[[Path], str | None], most: int) -> Path:
        for attempt in range(self.retries + 1):
            file = new_file()
            try:
                reason = self._download(name, file, most=most) or check(file)
            except UserError:
                raise
            except Exception as error:  # each file system has errors of its own; what cannot pass is told apart
                self._refuse_final(error, name)
                reason = f"{type(error).__name__}: {error}"
            if reason is None:
                return file
            file.unlink(missing_ok=True)
            if attempt < self.retries:
                delay = min(30.0, FIRST_DELAY * 2**attempt)
                _LOG.warning("Fetching '%s/%s' again in %.1f s: %s", self.url, name, delay, reason)
                time.sleep(delay)
        raise UserError(
            f"Got no whole '{self.url}/{name}' in {self.retries + 1} attempts, the last failed ({reason}), expected a file "
            "that can be fetched. Look at the server and the network, then start again; or raise "
            "data.init_args.fetch_retries or fetch_timeout."
        )

    def _refuse_final(self, error: Exception, name: str) -> None:
        """Raise what no repetition will change."""
        where = f"'{self.url}/{name}'"
        if isinstance(error, FileNotFoundError):
            how = "Correct data.init_args.path, or bring the file back."
            if name == INFO_FILE:
                how = "It is written last, so an interrupted upload lacks it. Correct data.init_args.path, or upload it again."
            raise UserError(f"Got no file {where}, expected a whole data set there. {how}") from error
        status = getattr(error, "status", 0)
        refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
        if isinstance(error, PermissionError) or refused or type(error).__name__ == "NoCredentialsError":
            raise UserError(
                f"Got no access to {where} ({error}), expected to be allowed to read it. Give credentials in the environment "
                "or in data.init_args.storage_options."
            ) from error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"Got no space for {where} in the cache ({error}), expected room for data.init_args.cache_size. Free some "
                "space, lower cache_size, or give another cache_dir."
            ) from error

    def _download(self, name: str, file: Path, *, most: int) -> str | None:
        """Fetch a file in a thread that is left alone when nothing comes; return what went wrong, None if it is here."""
        future: Future[None] = Future()

        def work() -> None:
            try:
                self._files.get_file(f"{self._root.rstrip('/')}/{name}", str(file))
            except BaseException as error:  # it is raised again by whoever waits
                future.set_exception(error)
            else:
                future.set_result(None)

        threading.Thread(target=work, name="fetch", daemon=True).start()
        seen, since = 0, time.monotonic()
        while not wait([future], timeout=min(self.timeout / 4, 1.0)).done:
            arrived = _arrived(file)
            if arrived > 2 * most:
                return f"it is longer than the {most:,} bytes that were expected"
            if arrived - seen >= LEAST_PROGRESS:
                seen, since = arrived, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                return f"less than {LEAST_PROGRESS:,} bytes came in {self.timeout:g} s"
        future.result()
        return None


def _arrived(file: Path) -> int:
    """Return a measure of what has been written: the length, and the blocks for those who write parts in any order."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return 0
    return stat.st_size + stat.st_blocks * 512
