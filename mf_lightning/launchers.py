"""What torchrun or SLURM has decided about processes and nodes, brought together with the trainer's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mf_lightning.types import UserError


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
