"""run.json: with what, on what and for how long a run was trained, over all its resumes."""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from mf_lightning.report import RECORD_FILE
from mf_lightning.report.tables import versions_here

FORMAT = 1


class RunRecord:
    """Keeps ``run.json`` of a fit. A resumed fit adds a session; one that starts at step 0 begins anew.

    It is written when training starts, after each validation and at the end, so that a killed run loses little.
    """

    def __init__(self) -> None:
        self._begin = 0.0
        self._file: Path | None = None
        self._content: dict[str, Any] = {}

    def begin(self) -> None:
        """Start the clock."""
        self._begin, self._file = time.monotonic(), None

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a session: the step is known now. On the first process only."""
        self._file = Path(trainer.default_root_dir) / RECORD_FILE
        earlier = _sessions(self._file) if trainer.global_step > 0 else []
        session = {
            "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
            "seconds": 0.0,
            "from_step": trainer.global_step,
            "to_step": trainer.global_step,
            "device": _device_name(pl_module.device),
            "devices": trainer.world_size,
            "nodes": trainer.num_nodes,
            "strategy": type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
            "compile": bool(getattr(pl_module, "compiled", False)),
            "batch_size": getattr(trainer.datamodule, "batch_size", None),
            "ended": False,
            "versions": versions_here(),
        }
        parameters = sum(parameter.numel() for parameter in pl_module.net.parameters())
        self._content = {"format": FORMAT, "parameters": parameters, "sessions": [*earlier, session]}
        self.update(trainer)

    def update(self, trainer: Trainer, *, ended: bool = False) -> None:
        """Write how far the session is; nothing before it is open. A file that cannot be written stops no training."""
        if self._file is None:
            return
        session = self._content["sessions"][-1]
        session |= {"seconds": round(time.monotonic() - self._begin, 3), "to_step": trainer.global_step, "ended": ended}
        aside = self._file.with_name(f".{self._file.name}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(self._content, indent=1) + "\n")
            aside.replace(self._file)
        except OSError as error:
            rank_zero_warn(f"{self._file} was not written: {error}")


def _sessions(file: Path) -> list[dict[str, Any]]:
    """Return the sessions of an earlier fit; [] where the file is missing or damaged."""
    try:
        content = json.loads(file.read_text())
        return [session for session in content["sessions"] if isinstance(session, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    model = models[0] if models else platform.machine()
    return f"{device.type} ({model}, {os.cpu_count()} cores)"
