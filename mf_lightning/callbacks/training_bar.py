"""The progress bar of training."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class TrainingBar(TQDMProgressBar):
    """Lightning's bar with the raw error, read from the device only when the bar is drawn.

    A metric logged with ``prog_bar=True`` is read at every step instead, and the host waits for the device each time.

    Args:
        refresh_rate: steps between two drawings.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what stands behind the bar; called when it is drawn."""
        found = super().get_metrics(trainer, pl_module)
        if "train/raw_error" in trainer.logged_metrics:
            found["raw_error"] = f"{float(trainer.logged_metrics['train/raw_error']):.4g}"
        return found
