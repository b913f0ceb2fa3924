"""Learning-rate schedules, per optimizer step, as plain PyTorch schedulers that a config names.

Their settings are not part of their state: a resumed run follows the config it is given.
"""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mf_lightning.types import UserError


def _rise(step: int, warmup_steps: int) -> float:
    """Return the share of the full rate during warm-up, 1 after it."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


class Warmup(LambdaLR):
    """Rise linearly to the optimizer's rate, then stay there.

    Args:
        optimizer: whose rate is scheduled.
        warmup_steps: optimizer steps until the full rate; step n runs at (n + 1) / warmup_steps of it. 0 is none.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise UserError(f"Got warmup_steps = {warmup_steps}, expected 0 (none) or more.")
        super().__init__(optimizer, lambda step: _rise(step, warmup_steps))


class WarmupLinearDecay(LambdaLR):
    """Rise linearly to the optimizer's rate, then fall linearly towards 0 at the last step.

    Args:
        optimizer: whose rate is scheduled.
        total_steps: optimizer steps of the run, normally ``${trainer.max_steps}``.
        warmup_steps: optimizer steps until the full rate, fewer than total_steps.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise UserError(
                f"Got warmup_steps = {warmup_steps}, total_steps = {total_steps}, expected 0 <= warmup_steps < total_steps."
            )
        falling = total_steps - warmup_steps
        super().__init__(optimizer, lambda step: _rise(step, warmup_steps) * max(0.0, min(1.0, (total_steps - step) / falling)))
