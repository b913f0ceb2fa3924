"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO


def file_checksum(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return stream_checksum(stream)


def stream_checksum(stream: BinaryIO) -> str:
    """Return the SHA-256 of what an open file still holds, in hexadecimal."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
