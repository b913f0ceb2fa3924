"""Embeddings of times and labels, as in the public SiT (willisma/SiT 947f95b, after DiT), times in [0, 1] unscaled."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from mf_lightning.nets import dual
from mf_lightning.nets.dual import Dual

FREQUENCIES = 256


class TimeEmbedder(nn.Module):
    """Sinusoids of a time, then two linear layers: (B,) => (B, D).

    In float32 at least, under autocast as well: in bfloat16 times a hundredth apart would look the same.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor, rows: int | None = None) -> Dual:
        """Return the embedding, with the derivative by ``t`` of the last ``rows`` rows; None gives none."""
        if t.is_meta:  # knows no autocast
            return self._embed(t, rows)
        with torch.autocast(t.device.type, enabled=False):
            return self._embed(t, rows)

    def _embed(self, t: Tensor, rows: int | None) -> Dual:
        half = FREQUENCIES // 2
        dtype = torch.promote_types(t.dtype, torch.float32)
        frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=dtype, device=t.device) / half)
        angle = t[:, None].to(dtype) * frequency  # (B, 128)
        cos, sin = torch.cos(angle), torch.sin(angle)
        features = torch.cat([cos, sin], dim=1).to(self.mlp[0].weight.dtype)  # (B, 256)
        change = None
        if rows is not None:
            first = len(t) - rows
            change = torch.cat([-sin[first:] * frequency, cos[first:] * frequency], dim=1).to(features.dtype)
        return dual.linear(self.mlp[2], dual.silu(dual.linear(self.mlp[0], Dual(features, change))))


class LabelEmbedder(nn.Module):
    """A table with one row per class and a last one, ``num_classes``, for the null label: (B,) int64 => (B, D).

    Between classes: weights of the table's rows, (B, num_classes + 1) float, give the mixture of their embeddings.
    It drops no labels itself: which rows lose theirs is the loss's decision (the public code does it here).
    """

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        if y.is_floating_point():
            return y.to(self.embedding_table.weight.dtype) @ self.embedding_table.weight
        return self.embedding_table(y)


def position_table(hidden_size: int, rows: int, columns: int) -> Tensor:
    """Return the fixed 2-D sine-cosine table, (1, rows * columns, D) float32: first half of D the column, then the row.

    Computed in float64 as MAE and DiT do (facebookresearch/DiT ed81ce2), rounded once.
    """
    quarter = hidden_size // 4
    omega = 1 / 10_000 ** (np.arange(quarter, dtype=np.float64) / quarter)

    def of(position: np.ndarray) -> np.ndarray:
        angle = position.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row, column = np.meshgrid(np.arange(rows, dtype=np.float64), np.arange(columns, dtype=np.float64), indexing="ij")
    return torch.from_numpy(np.concatenate([of(column), of(row)], axis=1)).float()[None]
