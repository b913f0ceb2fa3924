"""Small checkpoints to sample from, written without a run."""

from __future__ import annotations

from pathlib import Path

from mf_lightning.autoencoders import KLAutoencoder
from mf_lightning.checkpoints import CHECKPOINT_FORMAT, describe_net, write_checkpoint
from mf_lightning.data.shards import DatasetInfo
from mf_lightning.nets import SiT
from mf_lightning.types import LatentSpec
from tests.nets import randomise

SHIPPED = "mf_lightning:digits/autoencoder"
DIGITS = tuple("0123456789")


def digits_info(classes: tuple[str, ...] = DIGITS) -> DatasetInfo:
    """Return the description of digits that the shipped autoencoder encoded."""
    known = KLAutoencoder(SHIPPED)
    return DatasetInfo("moments", (4, 8, 8), "float16", False, known.id, known.scale, known.shift, 32, classes)


def pixel_info(classes: tuple[str, ...] = DIGITS) -> DatasetInfo:
    """Return the description of small grey pictures without an autoencoder."""
    return DatasetInfo("latents", (1, 16, 16), "float32", False, "pixel", 1.0, 0.0, 16, classes)


def write_generator(path: Path, info: DatasetInfo, *, told: bool = True, **more: object) -> Path:
    """Write a checkpoint of random weights: raw ones and averages of the decays 0.9 and 0.99, of which 0.99 was in use.

    Args:
        path: .ckpt file.
        info: of its data.
        told: whether it describes its data, as new checkpoints do.
        more: entries in the place of others.
    """
    net = SiT(LatentSpec(info.latent_shape, len(info.class_names)), patch_size=4, depth=1, hidden_size=32, num_heads=2)
    averages = {}
    for seed, decay in ((1, "0.9"), (2, "0.99")):
        randomise(net, seed=seed)
        averages[decay] = {name: value.detach().clone() for name, value in net.named_parameters()}
    randomise(net, seed=0)
    checkpoint = {
        "format_version": CHECKPOINT_FORMAT,
        "global_step": 7,
        "net": describe_net(net),
        "state_dict": {f"net.{name}": value for name, value in net.state_dict().items()},
        "ema": {"updates": 7, "weights": averages, **({"use": "0.99"} if told else {})},
        **({"data": info.describe(), "fm_fraction": 0.75} if told else {}),
        **more,
    }
    write_checkpoint(checkpoint, path)
    return path
