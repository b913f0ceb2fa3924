"""`python -m mf_lightning consolidate`: one safetensors file of a checkpoint's weights, raw or averaged, sharded or not."""

from __future__ import annotations

import json
from pathlib import Path

from mf_lightning.checkpoints import read_header
from mf_lightning.checkpoints.averages import choose_weights, read_weights, told
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
    name = choose_weights(weights, {"weights": read_header(checkpoint).get("ema", {}).get("weights", {})})
    tensors, whole = read_weights(checkpoint, name)
    metadata = {
        "format": "pt",
        "weights": told(name),
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
