"""Precision and recall by nearest neighbours (Kynkaanniemi et al., arXiv 1904.06991), block by block over all processes.

The definitions are torch-fidelity's (``metric_prc``): a set's ball about each of its features reaches to the third neighbour,
and distances are ``torch.cdist``'s in float32. Never is more than one block's distances to the other set in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mf_lightning.metrics.processes import summed, world
from mf_lightning.metrics.store import BLOCK, FeatureStore

NEIGHBOURS = 3


def radii(rows: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    """Return each row's distance to its third neighbour, itself not counted, (B,).

    Args:
        rows: (B, D), each of which is also among the blocks.
        blocks: the whole set, in parts.
    """
    nearest = torch.empty(len(rows), 0)
    for block in blocks:
        nearest = torch.cat([nearest, torch.cdist(rows, block)], dim=1)
        nearest = nearest.topk(min(NEIGHBOURS + 1, nearest.shape[1]), largest=False, sorted=True).values
    return nearest[:, -1]


def all_radii(real: Tensor) -> Tensor:
    """Return the radii of real features, (M, D), as (M,), each process computing some blocks; every process calls it."""
    rank, processes = world()
    found = torch.zeros(len(real))
    for start in range(rank * BLOCK, len(real), processes * BLOCK):
        found[start : start + BLOCK] = radii(real[start : start + BLOCK], real.split(BLOCK))
    return summed(found)


def precision_recall(generated: FeatureStore, real: Tensor, of_real: Tensor | None = None) -> tuple[float, float]:
    """Return precision and recall, each in [0, 1]; every process calls it.

    Args:
        generated: features of the generated images.
        real: features of the real ones, (M, D).
        of_real: their radii, (M,), as :func:`all_radii` returns them; None computes them.
    """
    real_blocks = real.split(BLOCK)
    real_radii = (all_radii(real) if of_real is None else of_real).split(BLOCK)
    own_radii = _own_radii(generated)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.int64)
    for place, rows in enumerate(generated.local_blocks()):
        reach = own_radii[place][:, None]
        hit = torch.zeros(len(rows), dtype=torch.bool)
        for number, block in enumerate(real_blocks):
            distance = torch.cdist(rows, block)
            hit |= (distance <= real_radii[number]).any(dim=1)
            covered[number * BLOCK : number * BLOCK + len(block)] += (distance <= reach).sum(dim=0)
        inside += int(hit.sum())
    precision = int(summed(torch.tensor(inside))) / generated.count
    recall = int((summed(covered) > 0).sum()) / len(real)
    return precision, recall


def _own_radii(generated: FeatureStore) -> list[Tensor]:
    """Return the radii of this process's images, by block; all blocks pass each process once."""
    own = [torch.empty(len(rows), 0) for rows in generated.local_blocks()]
    for block in generated.blocks():
        for place, rows in enumerate(generated.local_blocks()):
            joined = torch.cat([own[place], torch.cdist(rows, block)], dim=1)
            own[place] = joined.topk(min(NEIGHBOURS + 1, joined.shape[1]), largest=False, sorted=True).values
    return [nearest[:, -1] for nearest in own]
