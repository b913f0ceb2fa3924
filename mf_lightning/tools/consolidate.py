"""`python -m mf_lightning consolidate`: one safetensors file of a checkpoint's weights, raw or averaged, sharded or not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from mf_lightning.checkpoints import read_header
from mf_lightning.checkpoints.averages import RAW, choose_weights, read_weights, told
from mf_lightning.checkpoints.metadata import told_by_checkpoint, weights_metadata
from mf_lightning.checkpoints.publish import aside_path
from mf_lightning.types import UserError


def consolidate(checkpoint: Path, out: Path, weights: str | None = None, overwrite: bool = False) -> None:
    """Write one set of a checkpoint's weights to a safetensors file, with its network, data and loss as metadata.

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
    told_by_file = told_by_checkpoint(whole)
    if told_by_file is None:
        raise UserError(
            f"Got '{checkpoint}', which does not tell its network, expected a checkpoint of mf_lightning. Make one of others' "
            "weights with `python -m mf_lightning import`."
        )
    made_as = told_by_file.weights if name == RAW else None  # a checkpoint of weights alone says which they are
    metadata = weights_metadata({**asdict(told_by_file), "weights": made_as or told(name), "step": whole["global_step"]})
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
