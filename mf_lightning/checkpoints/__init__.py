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
from mf_lightning.checkpoints.weights import CHECKPOINT_FORMAT, check_architecture, describe_net

__all__ = [
    "CHECKPOINT_FORMAT",
    "LAST",
    "check_architecture",
    "describe_net",
    "find_last",
    "is_sharded_checkpoint",
    "newest_good",
    "read_checkpoint",
    "read_header",
    "tidy",
    "write_checkpoint",
]
