"""`python -m mf_lightning consolidate`: one safetensors file of a checkpoint's weights, raw or averaged, sharded or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mf_lightning.checkpoints import read_checkpoint, read_header
from mf_lightning.checkpoints.publish import aside_path
from mf_lightning.types import UserError


def consolidate(checkpoint: Path, out: Path, weights: str | None = None, overwrite: bool = False) -> None:
    """Write one set of a checkpoint's weights to a safetensors file, with the network's settings as metadata.

    Args:
        checkpoint: of any strategy: a file, or a directory of shards.
        out: .safetensors file to write.
        weights: "raw", or an EMA by its decay (0.9999); without it the only EMA, or the raw weights where there is none.
        overwrite: replace an existing file.

    Raises:
        UserError: no such weights, several EMAs and no choice, or the file exists.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if out.suffix != ".safetensors":
        raise UserError(f"Got OUT = {out}, expected a name that ends in .safetensors.")
    if out.exists() and not overwrite:
        raise UserError(f"Got OUT = {out}, which exists, expected a new file. Give another name, or --overwrite=true.")
    decays = list(read_header(checkpoint).get("ema", {}).get("weights", {}))
    name = _choose(weights, decays)
    kept = ("ema", "weights", name)
    whole = read_checkpoint(checkpoint, mmap=True, only=lambda keys: keys[0] == "state_dict" or keys[:3] == kept)
    tensors = whole["ema"]["weights"][name] if name != "raw" else _network(whole["state_dict"])
    if name != "raw":  # averages are kept of parameters; buffers are those of the network
        tensors = {**{k: v for k, v in _network(whole["state_dict"]).items() if k not in tensors}, **tensors}
    metadata = {
        "format": "pt",
        "weights": name if name == "raw" else f"ema {name}",
        "step": str(whole["global_step"]),
        "net": json.dumps(whole["net"]),
    }
    aside = aside_path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, aside, metadata=metadata)
        aside.replace(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"Got {out} not written ({error}), expected space for it. Free some, or give another place.") from error
    finally:
        aside.unlink(missing_ok=True)
    print(f"{out}: {metadata['weights']} weights at step {metadata['step']} of {checkpoint}, {out.stat().st_size / 1e6:.1f} MB")


def _choose(asked: str | None, decays: list[str]) -> str:
    if asked is None and len(decays) <= 1:
        return decays[0] if decays else "raw"
    found = next((d for d in decays if asked is not None and asked != "raw" and _same(asked, d)), None)
    if asked == "raw" or found:
        return found or "raw"
    raise UserError(
        f"Got --weights {asked}, expected raw or one of the checkpoint's averages: {', '.join(decays) or 'it has none'}. "
        "Choose one with --weights."
    )


def _same(asked: str, decay: str) -> bool:
    try:
        return float(asked.removeprefix("ema")) == float(decay)
    except ValueError:
        return False


def _network(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
