"""The network of a MeanFlow generator for diffusers; needs the package mf_lightning, whose network it is."""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from mf_lightning.pipeline.loading import make_net


class MeanFlowTransformer(ModelMixin, ConfigMixin):
    """Average velocity ``u(z_t, r, t | y)``.

    Args:
        generator: what mf_lightning's ``config.json`` says: class and settings of the network, scale and shift of the latents,
            names of the classes.
    """

    @register_to_config
    def __init__(self, generator: dict[str, Any]) -> None:
        super().__init__()
        self.net = make_net(generator["net"], trust_net=True)  # diffusers has asked for trust_remote_code

    def forward(self, z_t: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None) -> Tensor:
        """Return ``u``, (B, C, H, W), of states, times (1 = noise, 0 = data; r <= t), (B,), and labels, (B,) int64."""
        return self.net(z_t, t=t, r=r, y=y)
