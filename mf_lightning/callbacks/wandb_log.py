"""What W&B shows beside the logged values: a panel per metric with a line per NFE, a table, best figures, the protocol."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from mf_lightning.callbacks.curves import of_training, protocol_suffix, read_rows, weights_suffix
from mf_lightning.callbacks.sample_eval import RESULTS_FILE, SampleEval
from mf_lightning.callbacks.wandb_logger import SafeWandbLogger
from mf_lightning.metrics.protocol import COMPARED, METRICS

STEP = "trainer/global_step"
PRIVATE = ("storage_options",)
"""Settings that may hold keys and passwords."""


class WandbLog(Callback):
    """Keep a W&B run readable at a glance; nothing else of a run depends on it.

    ``curves/fid``, ... are charts of a metric against steps with one line per NFE, ``quality`` is the table of step, NFE and
    metrics, summaries hold the best and the last figure, and the run's config holds that of the command line, the protocol and
    the versions. Figures of another protocol than the run began with have keys, charts and summaries of their own, ``...@ID``.

    Args:
        config: the command line's settings as plain values.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}
        self._home: str | None = None
        self._defined: set[str] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the settings."""
        if not trainer.is_global_zero:
            return
        self._home, self._defined = None, set()
        versions = {"python": platform.python_version(), "torch": str(torch.__version__), "lightning": lightning.__version__}
        about = {
            **without_secrets(self.config),
            "versions": versions,
            "parameters": sum(p.numel() for p in pl_module.net.parameters()),
            "world_size": trainer.world_size,
            "device": torch.cuda.get_device_name() if pl_module.device.type == "cuda" else str(pl_module.device),
        }
        for logger in wandb_loggers(trainer):
            with surviving(logger):
                logger.experiment.config.update(about, allow_val_change=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the settings of `validate` and `test`."""
        if trainer.state.fn != "fit":
            self.on_fit_start(trainer, pl_module)

    on_test_start = on_validation_start

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how new figures are summarised, before the loggers get them, and store their protocol."""
        rows = self._rows(trainer)
        if not (trainer.is_global_zero and rows) or trainer.sanity_checking:
            return
        first = rows[0]["ema"]  # as `Home` of the logged figures
        protocols = {row["protocol_id"]: _shared(row["protocol"]) for row in rows}
        about = {"protocol": protocols[self._home], "protocol_id": self._home, "protocols": protocols}  # of keys without @
        kinds = {}
        for row in rows:
            ending = weights_suffix(row["ema"], first=first) + protocol_suffix(row["protocol_id"], home=self._home)
            for metric in METRICS:
                if row.get(metric.name) is not None:
                    kinds[f"{metric.name}/nfe{row['nfe']}{ending}"] = f"{metric.better},last"
        for logger in wandb_loggers(trainer):
            with surviving(logger):
                logger.experiment.config.update(about, allow_val_change=True)
                for key in kinds.keys() - self._defined:
                    logger.experiment.define_metric(key, step_metric=STEP, summary=kinds[key])
        self._defined |= kinds.keys()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log charts and table, of all figures so far."""
        rows = self._rows(trainer)
        if trainer.is_global_zero and rows and not trainer.sanity_checking:
            for logger in wandb_loggers(trainer):
                logger.log_metrics({**self._charts(trainer, rows), "quality": _table(rows)}, step=trainer.global_step)

    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def _rows(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Return what a training has measured so far, also before it was resumed; in `validate` and `test` what they did."""
        if not trainer.is_global_zero:
            return []
        if trainer.state.fn == "fit":
            rows = [row for row in read_rows(Path(trainer.default_root_dir) / RESULTS_FILE) if of_training(row)]
        else:
            rows = [row for callback in trainer.callbacks if isinstance(callback, SampleEval) for row in callback.rows]
        self._home = rows[0]["protocol_id"] if rows else None
        return rows

    def _charts(self, trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one chart per metric, average and protocol, with one line per NFE."""
        import wandb

        first = rows[0]["ema"]
        charts = {}
        for metric in METRICS:
            lines: dict[str, dict[int, dict[int, float]]] = {}
            for row in rows:
                if row.get(metric.name) is not None:
                    ending = weights_suffix(row["ema"], first=first) + protocol_suffix(row["protocol_id"], home=self._home)
                    lines.setdefault(ending, {}).setdefault(row["nfe"], {})[row["step"]] = row[metric.name]
            for ending, by_nfe in lines.items():
                charts[f"curves/{metric.name}{ending}"] = wandb.plot.line_series(
                    xs=[list(by_nfe[nfe]) for nfe in sorted(by_nfe)],
                    ys=[list(by_nfe[nfe].values()) for nfe in sorted(by_nfe)],
                    keys=[f"NFE {nfe}" for nfe in sorted(by_nfe)],
                    title=f"{metric.title} ({'lower' if metric.better == 'min' else 'higher'} is better){ending}",
                    xname="step",
                )
        return charts


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Return the trainer's W&B loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def surviving(logger: WandbLogger) -> AbstractContextManager[None]:
    """Return what a lost W&B process does inside the block: with our logger nothing, with Lightning's it is an error."""
    return logger.surviving() if isinstance(logger, SafeWandbLogger) else nullcontext()


def without_secrets(tree: Any) -> Any:
    """Return settings without the values of those that may hold keys and passwords."""
    if isinstance(tree, dict):
        return {key: "not shown" if key in PRIVATE and value else without_secrets(value) for key, value in tree.items()}
    return [without_secrets(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _shared(protocol: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in protocol.items() if key not in COMPARED}


def _table(rows: list[dict[str, Any]]) -> Any:
    """Return the table of step, EMA, NFE and metrics."""
    import wandb

    metrics = [metric.name for metric in METRICS if any(row.get(metric.name) is not None for row in rows)]
    columns = ["step", "weights", "nfe", *metrics, "images_per_s", "seconds_per_image", "protocol_id"]
    data = [
        [
            row["step"],
            "raw" if row["ema"] is None else f"EMA {row['ema']}",
            row["nfe"],
            *(row.get(name) for name in metrics),
            row.get("images_per_s"),
            row.get("seconds_per_image"),
            row["protocol_id"],
        ]
        for row in rows
    ]
    return wandb.Table(columns=columns, data=data)
