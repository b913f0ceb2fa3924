"""How a command ends when something is wrong: one message, from one process, and an exit code."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import InterpolationResolutionError
from tqdm.auto import tqdm

from mf_lightning.callbacks.liveness import first_is_gone, tell_failure
from mf_lightning.callbacks.preemption import Preempted
from mf_lightning.launchers import is_lost, process_rank, under_slurm, under_torchrun
from mf_lightning.types import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_AFTER_THE_CAUSE_S = 3  # torchrun, whose clock counts whole seconds, names the first to fail as the cause: not one that lost it


def end(error: Exception) -> int | None:
    """Say what is wrong and return the exit code; None for an error of our own, whose trace should be seen."""
    if isinstance(error, Preempted):
        return _end_preempted(error)
    message = message_of(error)
    if message is None:
        return None
    lost = is_lost(error)
    if not lost:
        _record(error, message)
    _say_once(f"error: {message}", lost=lost)
    if lost and "TORCHELASTIC_ERROR_FILE" in os.environ:
        time.sleep(_AFTER_THE_CAUSE_S)
        _record(error, message)
    return 1 if lost else 2


def leave(code: int | None, error: Exception) -> NoReturn:
    """Leave the process; where others are in the job, at once, since what waits for them at exit may wait for ever."""
    if code is None:
        _record(error)
        if _store() is None:
            raise error
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if _store() is not None and not isinstance(error, Preempted):
        tell_failure()
        os._exit(1 if code is None else code)
    sys.exit(code)


def message_of(error: Exception) -> str | None:
    """Return what to tell the user; None for an error of our own."""
    if isinstance(error, InterpolationResolutionError):
        return (
            f"Got a setting that could not be resolved: {str(error).splitlines()[0]}, expected every ${{...}} of "
            "the config to exist. Set the environment variable, or give the setting itself."
        )
    if isinstance(error, MisconfigurationException):
        return (
            f"Got settings that Lightning refuses ({error}), expected options that fit each other and this machine, "
            f"which has {torch.cuda.device_count()} GPUs. Change what it names (trainer.accelerator, trainer.devices, ...)."
        )
    user_error = _user_error(error)
    if user_error is not None:
        return str(user_error)
    if is_lost(error):
        return (
            f"Process {process_rank()} lost the others ({str(error).splitlines()[0][:200]}): one of them has ended or hangs; "
            "its own message stands elsewhere in this log. Go on from the last checkpoint with --ckpt_path=auto."
        )
    if isinstance(error, OSError) and error.errno in _FULL:
        return (
            f"Got no space to write {error.filename or 'a file'} ({error.strerror}), expected some. The last checkpoint is "
            "whole. Free some space, then go on with --ckpt_path=auto, or change trainer.default_root_dir."
        )
    if type(error).__module__.startswith("wandb"):
        return (
            f"Got no connection to W&B ({error}), expected a login and a server that answers. The last checkpoint is whole. "
            "Log in (wandb login), or write the run to disk with WANDB_MODE=offline and send it later (wandb sync); then go on "
            "with --ckpt_path=auto."
        )
    return None


def _user_error(error: BaseException | None) -> UserError | None:
    """Return the user's mistake behind an error: jsonargparse wraps what a class raises when it is made."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _end_preempted(error: Preempted) -> int:
    if process_rank() == 0:
        what = "the state is saved" if error.step else "there is nothing to save yet"
        print(f"Preempted by {error.signal} after step {error.step}: {what}. Go on with --ckpt_path=auto.", file=sys.stderr)
    started_by_us = process_rank() != 0 and not (under_torchrun() or under_slurm())
    return 0 if started_by_us else error.exit_code  # Lightning's launcher kills the first process if another reports a failure


def _record(error: Exception, message: str | None = None) -> None:
    """Leave the reason where torchrun's summary finds it: a message, or a trace."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and message is not None:
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": content}))
    elif file:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)


def _say_once(line: str, *, lost: bool) -> None:
    """Print from the first process; from another one only what the first does not say as well."""
    rank, store = process_rank(), _store()
    if rank == 0:
        if getattr(tqdm, "_instances", None):  # a bar without its end
            print(file=sys.stderr)
        print(line, file=sys.stderr, flush=True)
        if store is not None and not lost:
            with suppress(RuntimeError):
                store.set("mf_lightning/error", line)
                time.sleep(1)  # others ask for it
        return
    if store is None:
        on_first_node = os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", os.environ.get("NODE_RANK", "0"))) == "0"
        said = on_first_node or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0"  # one voice per node
    else:
        gone = first_is_gone(1.0 if lost else 0.0)
        said = rank > 1 if gone else gone is not None if lost else _first_says(store, line)
    if not said:
        print(line.replace("error: ", f"error: (process {rank} on {socket.gethostname()}) ", 1), file=sys.stderr, flush=True)


def _first_says(store: dist.Store, line: str) -> bool:
    """Wait a little for the first process to say the same."""
    for _ in range(30):
        time.sleep(0.1)
        try:
            if store.check(["mf_lightning/error"]):
                return store.get("mf_lightning/error").decode() == line
        except RuntimeError:  # the first process is gone, and had its say
            return True
    return False


def _store() -> dist.Store | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()
