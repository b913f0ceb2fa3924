"""The adaptive weight of the squared error: MeanFlow section 4.3, equation 22."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mf_lightning.types import UserError


@dataclass(frozen=True)
class AdaptiveWeight:
    """Weight ``w = sg[1 / (err + norm_eps)^norm_p]`` of a row's summed squared error.

    At ``norm_p = 1`` the weighted error is about 1 whatever the network does, so watch the raw error instead.

    Args:
        norm_p: 0 is the plain squared error, 0.5 like a pseudo-Huber loss, 1 the paper's choice on ImageNet.
        norm_eps: in units of the SUMMED squared error (0.01 in the paper).
    """

    norm_p: float = 1.0
    norm_eps: float = 0.01

    def __post_init__(self) -> None:
        if not self.norm_p >= 0:
            raise UserError(f"Got norm_p = {self.norm_p}, expected 0 (plain squared error) or more.")
        if not self.norm_eps > 0:
            raise UserError(f"Got norm_eps = {self.norm_eps}, expected a positive number (0.01 in the paper).")

    def __call__(self, raw_error: Tensor) -> Tensor:
        """Return the weights, (B,), detached, of summed squared errors, (B,)."""
        return 1 / (raw_error.detach() + self.norm_eps) ** self.norm_p
