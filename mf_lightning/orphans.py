"""Processes that Lightning's launcher started end with the one that started them: a kill leaves nothing behind that hangs."""

from __future__ import annotations

import os
import sys
import threading
import time

FIRST = "MF_LIGHTNING_FIRST_PROCESS"
"""Environment variable with the id of the first process: those that it starts inherit it, those that others start have none."""


def watch_parent(every_s: float = 1.0) -> None:
    """In a process that Lightning's launcher started, end it soon after the first process is gone; elsewhere leave a note.

    The first process writes its id into the environment. A process with a LOCAL_RANK other than 0 that finds the id there
    was started by the first one; one that torchrun, SLURM or a person started finds none, and is not watched.

    Args:
        every_s: seconds between two looks.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank == "0":
        os.environ[FIRST] = str(os.getpid())
    elif os.environ.get(FIRST, "").isdigit() and "TORCHELASTIC_RUN_ID" not in os.environ:
        first = int(os.environ[FIRST])
        threading.Thread(target=_watch, args=(rank, first, every_s), name="orphan-watch", daemon=True).start()


def _watch(rank: str, first: int, every_s: float) -> None:
    while os.getppid() == first:  # a process without a parent is given another one
        time.sleep(every_s)
    line = f"error: process {rank} stops: the first process ({first}) is gone; its reason stands above, if it could give one."
    print(line, file=sys.stderr, flush=True)
    os._exit(1)
