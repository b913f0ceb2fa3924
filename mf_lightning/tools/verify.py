"""`verify`: read a data set whole and compare every file with its checksum."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mf_lightning.data.shards import open_split, read_info


def verify(path: str | Path) -> None:
    """Check headers, sizes, checksums, labels and that every value is finite; print a summary.

    Raises:
        UserError: naming the first file that is wrong.
    """
    info = read_info(path)
    print(f"{path}: {info.kind} of shape {info.latent_shape}, {info.dtype}, made by {info.autoencoder}")
    for split in info.splits:
        shards = open_split(path, info, split, checksums=True)
        labels = np.concatenate([np.asarray(shard.labels) for shard in shards])
        per_class = np.bincount(labels, minlength=max(1, len(info.class_names)))
        finite = all(bool(np.isfinite(shard.latents).all()) for shard in shards)
        values = "all finite" if finite else "NOT ALL FINITE"
        spread = f"{per_class.min():,} to {per_class.max():,} per class"
        print(f"  {split}: {len(labels):,} samples in {len(shards)} shard(s), {spread}, checksums good, values {values}")
