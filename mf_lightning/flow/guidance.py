"""Classifier-free guidance built into the training target: MeanFlow section 4.2 and appendix, equations 16-21."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mf_lightning.types import UserError


@dataclass(frozen=True)
class Guidance:
    """Guided velocity ``v_g = omega v_t + kappa v_c + (1 - omega - kappa) v_u`` inside the interval, else ``v_t``.

    Sampling then needs no second pass: the network itself has learned the guided field.

    Args:
        omega: weight of the conditional velocity e - x; ``omega = 1, kappa = 0`` is no guidance.
        kappa: weight of the network's own velocity with the label; 0 saves that forward. The effective scale is
            omega / (1 - kappa).
        interval: times t at which guidance acts, closed at both ends, compared in float32.
    """

    omega: float = 1.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not self.omega > 0:
            raise UserError(f"Got omega = {self.omega}, expected a positive number; 1 with kappa = 0 is no guidance.")
        if not 0 <= self.kappa < 1:
            raise UserError(f"Got kappa = {self.kappa}, expected a number in [0, 1): the scale is omega / (1 - kappa).")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"Got guidance interval {self.interval}, expected two times 0 <= start <= end <= 1.")

    @property
    def is_none(self) -> bool:
        """Whether the guided velocity is the conditional one everywhere."""
        return self.omega == 1 and self.kappa == 0

    @property
    def effective_scale(self) -> float:
        """The scale omega' of ordinary classifier-free guidance that this amounts to."""
        return self.omega / (1 - self.kappa)

    @property
    def null_weight(self) -> float:
        """Weight of the unconditional velocity, ``1 - omega - kappa`` (0 saves that forward)."""
        return 1 - self.omega - self.kappa

    def acts_at(self, t: Tensor) -> Tensor:
        """Return (B,) bool: times inside the closed interval; bounds are rounded to float32, as times are."""
        low, high = torch.tensor(self.interval, dtype=torch.float32, device=t.device)
        t = t.to(torch.float32)
        return (t >= low) & (t <= high)

    def velocity(self, v_t: Tensor, *, v_c: Tensor | None, v_u: Tensor | None) -> Tensor:
        """Return ``v_g``, (B, C, H, W); a velocity whose weight is 0 may be None."""
        v_g = self.omega * v_t
        if self.kappa != 0:
            v_g = v_g + self.kappa * v_c
        if self.null_weight != 0:
            v_g = v_g + self.null_weight * v_u
        return v_g


@dataclass(frozen=True)
class GuidanceStage:
    """Guidance from one optimizer step on.

    Args:
        from_step: first optimizer step of the stage; steps count from 0.
        guidance: of the stage; the default is none.
    """

    from_step: int
    guidance: Guidance = field(default_factory=Guidance)


@dataclass(frozen=True)
class GuidanceSchedule:
    """Guidance by optimizer step, in stages: a function of the step alone, so a resumed run goes on in the right one.

    Args:
        stages: by rising ``from_step``; the first begins at step 0.
    """

    stages: list[GuidanceStage]

    def __post_init__(self) -> None:
        starts = [stage.from_step for stage in self.stages]
        if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
            raise UserError(
                f"Got guidance stages that begin at steps {starts}, expected rising steps, the first 0. A stage without "
                "`guidance` is one without guidance."
            )

    @property
    def is_none(self) -> bool:
        """Whether no stage is guided."""
        return all(stage.guidance.is_none for stage in self.stages)

    def at(self, step: int) -> Guidance:
        """Return the guidance of an optimizer step."""
        return [stage.guidance for stage in self.stages if stage.from_step <= step][-1]
