"""What a checkpoint tells of its network, and how weights alone are taken from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mf_lightning.checkpoints.files import read_checkpoint
from mf_lightning.sharding import is_sharded, local, placed
from mf_lightning.types import UserError

CHECKPOINT_FORMAT = 1


def imported_name(checkpoint: Mapping[str, Any]) -> str | None:
    """Return what a checkpoint of weights alone holds, "ema of meanflow-B4.pth"; None for a run's own state."""
    imported = checkpoint.get("imported")
    return None if imported is None else f"{imported['weights']} of {imported['source']}"


def describe_net(net: nn.Module) -> dict[str, Any]:
    """Return class and settings of a network as plain values (``config`` is the network's own account of them)."""
    kind = type(net).__bases__[1] if is_sharded(net) else type(net)  # FSDP2 makes a class (FSDPModule, SiT)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dict(net.config)}


def check_architecture(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse weights of another network.

    Raises:
        UserError: listing the settings that differ.
    """
    flat_saved, flat_ours = ({"class": n["class_path"], **n["init_args"]} for n in (saved, ours))
    keys = sorted({*flat_saved, *flat_ours})
    differ = [k for k in keys if flat_saved.get(k) != flat_ours.get(k)]
    if differ:
        got = ", ".join(f"{key} = {flat_saved.get(key)}" for key in differ)
        expected = ", ".join(f"{key} = {flat_ours.get(key)}" for key in differ)
        raise UserError(
            f"Got a checkpoint of another architecture ({got}), expected {expected}. Use the config.yaml beside the "
            "checkpoint, or another checkpoint."
        )


def check_resumable(checkpoint: dict[str, Any], init_from: str | None) -> None:
    """Refuse to resume what only holds weights, or a run that began elsewhere than the settings say.

    Args:
        checkpoint: to resume from.
        init_from: the run's setting.

    Raises:
        UserError: saying how to begin from the weights instead.
    """
    if "imported" in checkpoint:
        raise UserError(
            "Got imported weights to resume a fit from, expected a state that a fit has saved: there is no optimizer state in "
            "it. Begin from the weights: --model.init_from=FILE instead of --ckpt_path=FILE."
        )
    began = checkpoint.get("init_from")
    if init_from is not None and (began is None or Path(began).name != Path(init_from).name):
        raise UserError(
            f"Got model.init_from = {init_from} while resuming a run that began from {began or 'random weights'}, expected the "
            "same: a resumed run keeps its weights, so the setting would do nothing. Leave it out, or begin a new run "
            "without --ckpt_path."
        )


@torch.no_grad()
def load_initial(net: nn.Module, path: str) -> None:
    """Put imported weights into a network, whole or in shards; each process reads its own copy of the file.

    Args:
        net: of the same architecture.
        path: checkpoint made by ``import``.

    Raises:
        UserError: no such checkpoint, another architecture, a training state, which holds several sets of weights, or flow
            matching's whose h path was not silenced.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    if "imported" not in checkpoint:
        raise UserError(
            f"Got model.init_from = {path}, which is no imported checkpoint, expected one that says which weights are meant: "
            f"a training state holds raw and averaged ones. Make it: python -m mf_lightning import {path} OUT.ckpt"
        )
    imported = checkpoint["imported"]
    if imported.get("container") == "snapshots" and imported.get("flow_matching"):
        raise UserError(
            f"Got model.init_from = {path}, an average of a flow-matching run, expected one that says the same whatever r is: "
            f"its h path has only ever seen h = 0. Make it: python -m mf_lightning import {path} OUT.ckpt"
        )
    check_architecture(checkpoint["net"], describe_net(net))
    waiting = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    values = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}
    assert set(values) == set(waiting), "an imported checkpoint is complete"
    for name, target in waiting.items():
        local(target).copy_(local(placed(values[name], target)))
