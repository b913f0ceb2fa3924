"""One job at a time at a folder that is being filled."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mf_lightning.types import UserError

LOCK_FILE = ".lock"
"""In the folder until it is whole. The kernel gives back the lock of a process that dies; the file stays, and is used again."""


class Hold:
    """Keeps other jobs out of a folder until it is released, or this process ends, where the file system can.

    Args:
        out: the folder, made where it is absent.

    Raises:
        UserError: another job is working there.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, out: Path) -> None:
        self.file = out / LOCK_FILE
        out.mkdir(parents=True, exist_ok=True)
        while True:
            self.stream = self.file.open("ab")
            try:
                fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.stream.close()
                raise UserError(
                    f"Got OUT = '{out}', at which another job is working, expected one at a time. Wait for it, or stop it."
                ) from error
            except OSError as error:
                print(f"note: {out} is on a file system without locks ({error.strerror}); start only one job at it")
                return
            if self._is_there():
                return
            self.stream.close()  # the job before removed it meanwhile

    def release(self) -> None:
        """Let others in."""
        self.file.unlink(missing_ok=True)
        self.stream.close()

    def _is_there(self) -> bool:
        try:
            return self.file.stat().st_ino == os.fstat(self.stream.fileno()).st_ino
        except FileNotFoundError:
            return False


def is_left_over(entry: Path) -> bool:
    """Tell whether a file is one that a killed process of ours held, or was writing."""
    return entry.name == LOCK_FILE or (entry.name.startswith(".") and entry.suffix == ".tmp")
