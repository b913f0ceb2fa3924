"""What files of weights alone tell of them: as metadata of safetensors files, whoever writes them, and in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mf_lightning.types import UserError


@dataclass(frozen=True)
class Told:
    """What a file of this project tells of its weights."""

    net: dict[str, Any]
    """Class and settings of the network, ``class_path`` and ``init_args``."""
    data: dict[str, Any] | None
    """The data set's description; None is not told."""
    weights: str | None
    """Which weights those under ``state_dict``, or the file's only ones, are: "raw", "ema 0.9999", "phema 0.15"; None is not
    told, and for a checkpoint of a run "raw"."""
    flow_matching: bool | None
    """Whether the network only ever learned the instantaneous velocity; None is not told."""


def weights_metadata(told: Mapping[str, Any]) -> dict[str, str]:
    """Return a safetensors file's metadata, as :func:`told_by_metadata` reads it.

    Args:
        told: the fields of :class:`Told`, and ``step``, the optimizer steps behind the weights.
    """
    as_json = {name: json.dumps(told[name]) for name in ("net", "data", "flow_matching") if told[name] is not None}
    return {"format": "pt", "weights": told["weights"], "step": str(told["step"]), **as_json}


def told_by_metadata(metadata: Mapping[str, str]) -> Told | None:
    """Return what a safetensors file tells; None for one that this project did not write.

    Raises:
        UserError: it names a network of this project, and the rest cannot be read.
    """
    try:
        net = json.loads(metadata.get("net", "null"))
    except ValueError:  # somebody else's word for something else
        return None
    if not _is_net(net):
        return None
    try:
        data, flow_matching = (json.loads(metadata.get(name, "null")) for name in ("data", "flow_matching"))
        return _checked(Told(net, data, metadata.get("weights"), flow_matching))
    except ValueError as error:
        raise UserError(
            f"Got a safetensors file of {net['class_path']} whose metadata cannot be read ({error}), expected data and "
            "flow_matching as consolidate, phema and export write them. Write the file again."
        ) from error


def told_by_checkpoint(checkpoint: Mapping[str, Any]) -> Told | None:
    """Return what a checkpoint of this project tells, of a run or of weights alone; None where it does not tell its network."""
    net, imported = checkpoint.get("net"), checkpoint.get("imported")
    if not _is_net(net):
        return None
    imported = imported if isinstance(imported, Mapping) else {}
    share = checkpoint.get("fm_fraction")
    flow_matching = imported.get("flow_matching") if share is None else share == 1 or imported.get("flow_matching") is True
    data = checkpoint.get("data")
    return Told(dict(net), dict(data) if isinstance(data, Mapping) else None, imported.get("weights"), flow_matching)


def _is_net(net: Any) -> bool:
    """Tell whether a value is a network's class and settings, as ``describe_net`` gives them."""
    return isinstance(net, Mapping) and isinstance(net.get("class_path"), str) and isinstance(net.get("init_args"), Mapping)


def _checked(told: Told) -> Told:
    if not (told.data is None or isinstance(told.data, dict)):
        raise ValueError(f"data = {told.data!r}")
    if not (told.flow_matching is None or isinstance(told.flow_matching, bool)):
        raise ValueError(f"flow_matching = {told.flow_matching!r}")
    return told
