"""A folder that diffusers loads: model_index.json, transformer, vae, and the code of both classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mf_lightning.autoencoders import KLAutoencoder
from mf_lightning.checkpoints.metadata import weights_metadata
from mf_lightning.pipeline import MeanFlowPipeline

CODE = Path(__file__).resolve().parent.parent / "pipeline" / "for_diffusers"
PIPELINE, NETWORK = "pipeline", "modeling_meanflow"
CLASS = "MeanFlowDiffusionPipeline"


def export_diffusers(pipeline: MeanFlowPipeline, folder: Path) -> None:
    """Write the folder; ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` loads it, and so does
    ``MeanFlowPipeline.from_pretrained``."""
    import diffusers
    from safetensors.torch import save_file

    decoder = pipeline.autoencoder
    inside = folder / "transformer"
    inside.mkdir(parents=True)
    state = {f"net.{name}": value.detach().cpu().contiguous() for name, value in pipeline.net.state_dict().items()}
    save_file(state, inside / "diffusion_pytorch_model.safetensors", metadata=weights_metadata(pipeline.description.plain()))
    version = {"_diffusers_version": diffusers.__version__}
    _write(inside / "config.json", {"_class_name": "MeanFlowTransformer", **version, "generator": pipeline.description.plain()})
    shutil.copyfile(CODE / f"{NETWORK}.py", inside / f"{NETWORK}.py")
    shutil.copyfile(CODE / f"{PIPELINE}.py", folder / f"{PIPELINE}.py")
    if isinstance(decoder, KLAutoencoder):
        decoder.net.save_pretrained(folder / "vae")
    index = {
        "_class_name": [PIPELINE, CLASS],
        **version,
        "transformer": [NETWORK, "MeanFlowTransformer"],
        "vae": ["diffusers", "AutoencoderKL"] if isinstance(decoder, KLAutoencoder) else [None, None],
    }
    _write(folder / "model_index.json", index)


def _write(file: Path, body: dict) -> None:
    file.write_text(json.dumps(body, indent=1) + "\n")
