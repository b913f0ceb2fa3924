"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path


def write_aside(file: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that a whole file or none is seen."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
