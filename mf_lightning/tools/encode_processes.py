"""Several processes that encode one data set: who is who, what the first one decides, and the moment when all are done."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from mf_lightning.launchers import is_lost
from mf_lightning.types import UserError

T = TypeVar("T")
_WAIT = timedelta(days=7)
"""Processes meet twice, at the beginning and when the last shard is done."""


class Processes:
    """This process among those that torchrun started; a single one without it.

    Args:
        environment: of this process: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Raises:
        UserError: several processes, but no address where they meet.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.world = int(environment.get("WORLD_SIZE") or 1)
        self.rank = int(environment.get("RANK") or 0)
        self.local_rank = int(environment.get("LOCAL_RANK") or 0)
        self.local_world = int(environment.get("LOCAL_WORLD_SIZE") or 1)
        self._counted = 0
        if self.world > 1:
            if not environment.get("MASTER_ADDR"):
                raise UserError(
                    f"Got WORLD_SIZE = {self.world} without MASTER_ADDR, expected the address where processes meet. Start them "
                    "with torchrun: torchrun --nproc-per-node=8 -m mf_lightning encode ..."
                )
            dist.init_process_group("gloo", timeout=_WAIT)

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes; where it fails with a UserError, the others end without a word."""
        if self.world == 1:
            return make()
        box: list = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except (UserError, ImportError) as error:
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            self.part()
            if self.rank != 0:
                sys.exit(2)
            raise box[1]
        return box[0]

    def counted(self, more: int) -> int:
        """Add to the number of images done, and return it for all processes together."""
        if self.world == 1:
            self._counted += more
            return self._counted
        return dist.distributed_c10d._get_default_store().add("mf_lightning/encoded", more)

    def wait_for_all(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when every process is here.

        Args:
            meanwhile: called every now and then while this one waits.

        Raises:
            UserError: one has ended.
        """
        if self.world == 1:
            return
        try:
            meeting = dist.barrier(async_op=True)
            while not meeting.is_completed():
                meanwhile()
                time.sleep(0.05)
            meeting.wait()
            meanwhile()
        except RuntimeError as error:
            if is_lost(error):
                raise UserError(
                    "Got another process that ended before its shards were done, expected all. Its own message is above; give "
                    "the same command again, finished shards are kept."
                ) from error
            raise

    def part(self) -> None:
        """Close the connections."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def device(self, name: str) -> torch.device:
        """Return this process's device: "auto" takes a GPU of its own where there is one.

        Raises:
            UserError: an unknown name, no GPU, or fewer GPUs than processes.
        """
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"Got --device={name}, expected auto, cpu or cuda.")
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"Got {self.local_world} process(es) and {torch.cuda.device_count()} GPU(s) here, expected one each. Start "
                "fewer, or give --device=cpu."
            )
        return torch.device("cuda", self.local_rank)
