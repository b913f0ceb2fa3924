"""Features of a bounded number of images, chosen at random by (seed, number)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, distributed

from mf_lightning import draws
from mf_lightning.draws import Stream
from mf_lightning.metrics.processes import sent_from, world

MOST = 50_000
"""Images whose features a reference holds: KID, precision and recall of the field take no more."""


PART = 4096
"""Rows that travel at a time."""


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
        rows, order = self.rows[: len(self.keys)], np.argsort(_numbers(self.keys))
        return torch.from_numpy(rows if (order == np.arange(len(order))).all() else rows[order])

    def over_processes(self) -> KeptFeatures:
        """Return the choice among the images of all processes, on the first one; every process calls it."""
        rank, processes = world()
        if processes == 1:
            return self
        everyone: list = [None] * processes
        distributed.all_gather_object(everyone, self.keys)
        keys = np.sort(np.concatenate(everyone))[: self.most]
        chosen = [np.flatnonzero(theirs <= keys[-1]) if len(keys) else [] for theirs in everyone]
        numbers = np.sort(_numbers(keys))
        joined = KeptFeatures(self.dim, self.most, seed=self.seed)
        if rank == 0:
            joined.keys = np.empty(len(keys), np.uint64)
        for source, places in enumerate(chosen):  # a part at a time, or the first process would hold all rows twice
            for start in range(0, len(places), PART):
                part = places[start : start + PART]
                mine = torch.from_numpy(self.rows[part]) if source == rank else torch.empty(len(part), self.dim)
                rows = sent_from(source, mine)
                if rank == 0:
                    to = np.searchsorted(numbers, _numbers(everyone[source][part]))
                    joined.keys[to], joined.rows[to] = everyone[source][part], rows.numpy()
        return joined


def _numbers(keys: np.ndarray) -> np.ndarray:
    """Return the images' numbers, without the draws before them."""
    return keys & np.uint64(0xFFFFFFFF)
