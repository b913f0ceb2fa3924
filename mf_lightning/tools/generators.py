"""The generator that `sample` and `export` begin with: a checkpoint, or a folder that `export` made."""

from __future__ import annotations

from pathlib import Path

from mf_lightning.checkpoints import is_sharded_checkpoint
from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.types import UserError


def open_generator(
    path: Path,
    *,
    weights: str | None,
    autoencoder: str | None,
    data: str | None,
    device: str | None,
    trust_net: bool,
) -> MeanFlowPipeline:
    """Return the generator and print which weights it has.

    Raises:
        UserError: it cannot be read, or an option that a folder has no use for.
    """
    if path.is_dir() and not is_sharded_checkpoint(path):
        if weights is not None or data is not None:
            raise UserError(
                f"Got --weights or --data with the folder '{path}', expected neither: it holds one set of weights and tells of "
                "its data. Leave them out, or give the checkpoint."
            )
        pipeline = MeanFlowPipeline.from_pretrained(path, autoencoder=autoencoder, device=device, trust_net=trust_net)
    else:
        pipeline = MeanFlowPipeline.from_checkpoint(
            path, weights=weights, autoencoder=autoencoder, data=data, device=device, trust_net=trust_net
        )
    told = pipeline.description
    of = "" if told.origin is None else f" of {told.origin['source']}"
    print(f"{path}: {told.weights} weights{of} at step {told.step:,}, on {pipeline.device}")
    return pipeline
