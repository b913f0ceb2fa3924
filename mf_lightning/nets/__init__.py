"""Networks: anything with the call of :class:`mf_lightning.types.AverageVelocity`."""

from mf_lightning.nets.mlp import MLP
from mf_lightning.nets.sit import SIZES, SiT

__all__ = ["MLP", "SIZES", "SiT"]
