"""Checkpoints on disk: whole or absent, checked when read, and readable without running code."""

from mf_lightning.checkpoints.files import (
    is_sharded_checkpoint,
    newest_good,
    read_checkpoint,
    read_header,
    tidy,
    write_checkpoint,
)
from mf_lightning.checkpoints.publish import LAST, find_last

__all__ = [
    "LAST",
    "find_last",
    "is_sharded_checkpoint",
    "newest_good",
    "read_checkpoint",
    "read_header",
    "tidy",
    "write_checkpoint",
]
