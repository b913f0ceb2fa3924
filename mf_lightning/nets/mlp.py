"""An MLP for data that are not pictures: a table's rows, points, signals. Torch only, differentiated by torch.func.jvp."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mf_lightning.nets.embed import LabelEmbedder, TimeEmbedder
from mf_lightning.types import LatentSpec, UserError


class MLP(nn.Module):
    """Average-velocity network ``u(z_t, r, t | y)`` for data of any shape, which it flattens to D numbers.

    Like SiT it sees ``t`` and ``h = t - r``, and returns 0 before the first step.

    Args:
        latent: shape of one sample, of any length, and number of classes; 0 classes train without labels.
        hidden_size: width H.
        depth: number of residual blocks of two linear layers.
    """

    def __init__(self, latent: LatentSpec, hidden_size: int = 128, depth: int = 3) -> None:
        super().__init__()
        if hidden_size < 1 or depth < 1:
            raise UserError(f"Got hidden_size = {hidden_size}, depth = {depth}, expected at least 1 of each.")
        size = math.prod(latent.shape)
        self.y_null = latent.num_classes or None
        """The null label; None without labels."""
        self.config = {
            "latent_shape": list(latent.shape),
            "num_classes": latent.num_classes,
            "hidden_size": hidden_size,
            "depth": depth,
        }
        self.z_embedder = nn.Linear(size, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.h_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(latent.num_classes, hidden_size) if latent.num_classes else None
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
            for _ in range(depth)
        )
        self.final = nn.Linear(hidden_size, size)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    def forward(self, z_t: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None = None) -> Tensor:
        """Return ``u``, (B, ...), of states (B, ...), times (B,) and labels (B,)."""
        condition = self.t_embedder(t).x + self.h_embedder(t - r).x  # (B, H)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(y)
        hidden = self.z_embedder(z_t.reshape(z_t.shape[0], -1))  # (B, H)
        for block in self.blocks:
            hidden = hidden + block(nn.functional.silu(hidden + condition))
        return self.final(nn.functional.silu(hidden + condition)).reshape(z_t.shape)
