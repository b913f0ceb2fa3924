"""Features of a bounded number of images, chosen at random by (seed, number)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, distributed

from mf_lightning import draws
from mf_lightning.draws import Stream
from mf_lightning.metrics.processes import world

MOST = 50_000
"""Images whose features a reference holds: KID, precision and recall of the field take no more."""


class KeptFeatures:
    """Features of the images whose draws by (seed, number) are smallest: a uniform choice without replacement.

    It depends neither on the order in which images come, nor on batches or processes, nor on how many will follow.

    Args:
        dim: number of features.
        most: images to keep.
        seed: of the choice.
    """

    def __init__(self, dim: int, most: int = MOST, *, seed: int = 0) -> None:
        self.dim, self.most, self.seed = dim, most, seed
        self.keys = np.empty(0, np.uint64)
        """Draw and number of each kept image: unique, so that no two draws are equal."""
        self.rows = np.empty((most, dim), np.float32)  # the system gives memory as it is filled

    def add(self, index: Tensor, features: Tensor) -> None:
        """Offer features, (B, D), on any device, of images of these numbers, (B,), each given once."""
        uniform = draws.uniform(self.seed, Stream.KEPT_FEATURES, step=0, rows=index.cpu(), count=1)[:, 0].numpy()
        new = ((uniform * 2.0**32).astype(np.uint64) << np.uint64(32)) | index.cpu().numpy().astype(np.uint64)
        joined = np.concatenate([self.keys, new])
        before, count = len(self.keys), min(self.most, len(joined))
        stays = np.zeros(len(joined), bool)
        if count:
            stays[np.argpartition(joined, count - 1)[:count]] = True
        entering = np.flatnonzero(stays[before:])
        places = np.concatenate([np.flatnonzero(~stays[:before]), np.arange(before, count)])
        if len(entering):
            self.rows[places] = features[torch.from_numpy(entering)].detach().to("cpu", torch.float32).numpy()
        self.keys = np.concatenate([self.keys, np.empty(count - before, np.uint64)])
        self.keys[places] = new[entering]

    def sorted(self) -> Tensor:
        """Return the kept features by number of the image, (N, D) float32."""
        order = np.argsort(self.keys & np.uint64(0xFFFFFFFF))
        return torch.from_numpy(self.rows[: len(self.keys)][order])

    def over_processes(self) -> KeptFeatures:
        """Return the choice among the images of all processes, on the first one; every process calls it."""
        rank, processes = world()
        if processes == 1:
            return self
        everyone: list = [None] * processes
        distributed.all_gather_object(everyone, self.keys)
        keys = np.sort(np.concatenate(everyone))
        mine = self.keys <= keys[min(self.most, len(keys)) - 1] if self.most and len(keys) else np.zeros(len(self.keys), bool)
        parts: list = [None] * processes
        kept = (self.keys[mine], self.rows[: len(self.keys)][mine])
        distributed.gather_object(kept, parts if rank == 0 else None)
        joined = KeptFeatures(self.dim, self.most, seed=self.seed)
        if rank == 0:
            joined.keys = np.concatenate([part[0] for part in parts])
            joined.rows = np.concatenate([part[1] for part in parts])
        return joined
