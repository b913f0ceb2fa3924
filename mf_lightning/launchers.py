"""What torchrun or SLURM has decided about processes and nodes, brought together with the trainer's settings."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mf_lightning.types import UserError

_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out", "Timed out waiting", "Read timeout",
    "Connection refused", "remote process exited", "NCCL communicator was aborted", "Heartbeat monitor", "TCPStore",
)  # fmt: skip


def process_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process among all, as far as the environment tells; 0 for a single one."""
    for name in ("RANK", "SLURM_PROCID"):
        if environment.get(name, "").isdigit():
            return int(environment[name])
    local, nodes = environment.get("LOCAL_RANK", "0"), environment.get("NODE_RANK", "0")
    return int(local) if nodes in ("", "0") else int(local) + 1  # Lightning's own launcher: only "first or not" is known


def under_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in environment


def under_slurm(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a SLURM job step with several tasks started this process (an interactive shell does not count)."""
    tasks, name = environment.get("SLURM_NTASKS", "1"), environment.get("SLURM_JOB_NAME", "")
    return (
        "SLURM_PROCID" in environment
        and tasks != "1"
        and name not in ("bash", "interactive")
        and not under_torchrun(environment)
    )


def is_lost(error: BaseException) -> bool:
    """Tell whether an error says that another process of the job has ended or cannot be reached."""
    in_job = dist.is_available() and dist.is_initialized()
    return in_job and isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)


def follow_launcher(trainer: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Set nodes and devices of a trainer's configuration to what the launcher started, where they were left open.

    Args:
        trainer: has ``num_nodes`` (1 is open) and ``devices`` ("auto" is open).
        environment: of this process.

    Raises:
        UserError: the settings contradict the launcher; or several processes without an address to meet at.
    """
    if under_torchrun(environment):
        nodes, local = int(environment["GROUP_WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        _take(trainer, "torchrun", f"--nnodes={nodes} --nproc-per-node={local}", nodes, local)
    elif under_slurm(environment):
        nodes = int(environment.get("SLURM_NNODES", "1"))
        tasks = int(environment["SLURM_NTASKS"])
        if tasks % nodes:
            raise UserError(
                f"Got a SLURM job of {tasks} tasks on {nodes} nodes, expected equally many tasks on each, one per device. Give "
                "--nodes and --ntasks-per-node."
            )
        _take(trainer, "SLURM", f"--nodes={nodes} --ntasks-per-node={tasks // nodes}", nodes, tasks // nodes)
    else:
        _check_address(trainer, environment)


def _take(trainer: Any, who: str, how: str, nodes: int, local: int) -> None:
    if trainer.num_nodes not in (1, nodes):
        raise UserError(
            f"Got trainer.num_nodes = {trainer.num_nodes} under {who} with {how}, expected {nodes}. Leave trainer.num_nodes "
            f"out: it is taken from {who}."
        )
    trainer.num_nodes = nodes
    asked = trainer.devices
    count = len(asked) if isinstance(asked, list) else int(asked) if str(asked).isdigit() else None
    if asked in ("auto", -1, "-1"):
        trainer.devices = local
    elif count != local:
        raise UserError(
            f"Got trainer.devices = {asked} under {who} with {how}, expected {local}. Leave it to {who}: "
            "--trainer=configs/trainer/ddp.yaml (or fsdp.yaml) has devices: auto."
        )


def _check_address(trainer: Any, environment: Mapping[str, str]) -> None:
    several = trainer.num_nodes > 1 or int(environment.get("WORLD_SIZE") or 1) > 1
    if several and not environment.get("MASTER_ADDR"):
        raise UserError(
            f"Got {trainer.num_nodes} node(s) and WORLD_SIZE = {environment.get('WORLD_SIZE') or 'unset'} without MASTER_ADDR, "
            "expected the address of the first node, where processes meet. Start the job with torchrun or SLURM "
            "(docs/cluster.md), or set MASTER_ADDR, MASTER_PORT and NODE_RANK on every node."
        )


def meet(strategy: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Open the process group of a job whose processes meet in the store of torchrun's agent; elsewhere leave it to Lightning.

    The agent keeps its store over a restart, and in it the addresses of processes that are gone: whoever reads before they are
    written anew waits for nobody, or is refused (pytorch/pytorch issues 135712 and 167288). So each attempt agrees on a part of
    the store that only it uses. The agents' own count of restarts would not do: it differs between nodes.

    Args:
        strategy: of the trainer.
        environment: of this process.
    """
    in_agents_store = under_torchrun(environment) and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if not in_agents_store or world == 1 or dist.is_initialized():
        return
    if not hasattr(strategy, "_timeout"):
        raise UserError(
            f"Got {type(strategy).__name__} for {world} processes of torchrun, expected a strategy for several. Give "
            "--trainer=configs/trainer/ddp.yaml (or fsdp.yaml)."
        )
    timeout, device = strategy._timeout or timedelta(minutes=30), strategy.root_device
    address = (environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    store = dist.TCPStore(*address, world_size=world, is_master=False, timeout=timeout)
    try:
        store = dist.PrefixStore(fresh_prefix(store, rank, world, timeout), store)
    except (TimeoutError, dist.DistStoreError) as error:
        raise UserError(
            f"Got not all of {world} processes at {address[0]}:{address[1]} ({str(error).splitlines()[0]}), expected all "
            f"within {timeout}. Look for the first error of each node in this log."
        ) from error
    how = {"rank": rank, "world_size": world, "timeout": timeout, "device_id": None if device.type == "cpu" else device}
    dist.init_process_group(strategy._get_process_group_backend(), store=store, **how)
    atexit.register(_part)


def agreed(value: str | None) -> str | None:
    """Return the first process's value, where processes have met already; network file systems show others an older state."""
    if not dist.is_initialized():
        return value
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set("mf_lightning/agreed", value or "")
    return store.get("mf_lightning/agreed").decode() or None


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def fresh_prefix(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """Agree on a prefix for keys of a store that may hold anything from earlier attempts; every process calls it.

    Each process names itself by a number that was never used; the first one answers under that number, so no answer is an old
    one, and goes on when all have confirmed.

    Raises:
        TimeoutError: processes that did not come.
    """
    me, ours = uuid.uuid4().hex, "mf_lightning/meeting"
    if rank != 0:
        store.set(f"{ours}/{rank}", me)
        store.wait([f"{ours}/{me}"], timeout)
        prefix = store.get(f"{ours}/{me}").decode()
        store.set(f"{prefix}/{rank}", "here")
        return prefix
    prefix, missing, answered = f"mf_lightning/{me}", set(range(1, world)), {}
    limit = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{ours}/{other}"]) and (name := store.get(f"{ours}/{other}").decode()) != answered.get(other):
                store.set(f"{ours}/{name}", prefix)
                answered[other] = name
            if store.check([f"{prefix}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > limit:
            raise TimeoutError(f"processes {sorted(missing)} did not come within {timeout}")
        if missing:
            time.sleep(0.05)
    return prefix
