"""One set of weights out of a checkpoint: raw, or one of its averages."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import Tensor

from mf_lightning.checkpoints.files import read_checkpoint
from mf_lightning.types import UserError

RAW = "raw"


def choose_weights(asked: str | None, ema: dict[str, Any], *, default: str | None = None) -> str:
    """Return the name of a set of weights: "raw", or an average's as the checkpoint has it.

    Args:
        asked: "raw", or an average's decay (0.9999, ema0.9999); None leaves the choice to the rest.
        ema: the checkpoint's entry, ``weights`` by name and, in newer ones, ``use``.
        default: average to take where nothing was asked for and the checkpoint names none; None asks where there are several.

    Raises:
        UserError: no such weights, or several averages and no choice.
    """
    names = list(ema.get("weights", {}))
    wanted = asked or ema.get("use") or default
    if wanted is None and len(names) <= 1:
        return names[0] if names else RAW
    found = next((name for name in names if wanted not in (None, RAW) and _same(wanted, name)), None)
    if found or wanted == RAW:
        return found or RAW
    if asked is None and not names:  # a setting named an average that was never begun
        return RAW
    raise UserError(
        f"Got --weights {asked}, expected raw or one of the checkpoint's averages: {', '.join(names) or 'it has none'}. "
        "Choose one with --weights."
    )


def _same(asked: str, name: str) -> bool:
    try:
        return float(asked.removeprefix("ema").strip()) == float(name)
    except ValueError:
        return asked == name


def read_weights(path: str | PathLike, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the network's tensors by its own names, buffers included, and the checkpoint they came from.

    Args:
        path: a file, or a directory of shards.
        name: as :func:`choose_weights` gives it.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    kept = ("ema", "weights", name)
    whole = read_checkpoint(path, mmap=True, only=lambda keys: keys[0] == "state_dict" or keys[:3] == kept)
    raw = {key.removeprefix("net."): value for key, value in whole["state_dict"].items() if key.startswith("net.")}
    tensors = raw if name == RAW else {**raw, **whole["ema"]["weights"][name]}  # averages are kept of parameters only
    return {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}, whole


def told(name: str) -> str:
    """Return a set of weights as it is told to people: "raw", "ema 0.9999"."""
    return name if name == RAW else f"ema {name}"
