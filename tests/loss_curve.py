"""The stored loss curve of the smoke recipe in float64: a refactor proves with it that no number moved.

python -m tests.loss_curve      # records it anew, after a change that is meant to move numbers; say why in the commit
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from lightning import Callback

from mf_lightning import draws
from mf_lightning.cli import load
from mf_lightning.draws import Stream
from tests.runs import RECIPES

STORED = Path(__file__).parent / "data" / "smoke_curve.json"
STEPS = 12


class Recorder(Callback):
    """Start from random non-zero weights (a fresh network has u = 0 and dudt = 0), keep each step's raw numbers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_fit_start(self, trainer, pl_module):
        with torch.no_grad():
            for number, parameter in enumerate(pl_module.net.parameters()):
                rows = torch.tensor([number])
                noise = draws.normal(7, Stream.NOISE, step=0, rows=rows, shape=parameter.shape, dtype=torch.float64)
                parameter.copy_(0.2 * noise[0])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        terms = pl_module.last_terms
        gradient = torch.nn.utils.get_total_norm([p.grad for p in pl_module.net.parameters()])
        self.rows.append(
            {
                "raw_error": terms.raw_error.sum().item(),
                "dudt_norm": terms.dudt_norm.sum().item(),
                "grad_norm": gradient.item(),
            }
        )


def record(root: Path, self_check: bool = True) -> list[dict[str, float]]:
    """Run the recipe for a few steps in float64 and return each step's numbers."""
    options = {
        "trainer.default_root_dir": root,
        "trainer.precision": "64-true",
        "trainer.max_steps": STEPS,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "sample_eval.num_samples": 0,
        "self_check.enabled": str(self_check).lower(),
    }
    cli = load(["--config", str(RECIPES / "smoke.yaml"), *(f"--{key}={value}" for key, value in options.items())])
    recorder = Recorder()
    cli.trainer.callbacks.append(recorder)
    cli.trainer.fit(cli.model, cli.datamodule)
    return recorder.rows


def main() -> None:
    """Store the curve."""
    with tempfile.TemporaryDirectory() as root:
        rows = record(Path(root))
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"Stored {len(rows)} steps in {STORED}")


if __name__ == "__main__":
    main()
