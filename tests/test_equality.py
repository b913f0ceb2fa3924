"""How a step is cut into batches changes nothing."""

import pytest
import torch

from mf_lightning.cli import load
from tests.runs import RECIPES


def train(root, accumulate: int):
    """Train the smoke recipe for four steps in float64 and return its weights."""
    quiet = ["enable_progress_bar=false", "enable_model_summary=false", "limit_val_batches=0", "precision=64-true"]
    settings = [f"--trainer.{s}" for s in (*quiet, "max_steps=4", f"accumulate_grad_batches={accumulate}")]
    cli = load(
        [
            "--config",
            str(RECIPES / "smoke.yaml"),
            f"--trainer.default_root_dir={root}",
            "--sample_eval.num_samples=0",
            *settings,
        ]
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 4
    ema = next(c for c in cli.trainer.callbacks if type(c).__name__ == "EMA")
    assert ema.updates == 4
    return {**cli.model.net.state_dict(), **{f"ema.{name}": value for name, value in ema.weights[0.99].items()}}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_batches_equal_the_whole_batch(tmp_path, accumulate):
    """Also the clipped gradients: rows, draws and counts are those of the global batch."""
    whole, parts = train(tmp_path / "whole", 1), train(tmp_path / "parts", accumulate)
    moved = sum((value - torch.zeros_like(value)).abs().sum() for name, value in whole.items() if "final_layer" in name)
    assert moved > 0  # the zero-initialised layers have left their start
    for name, value in whole.items():
        assert (value - parts[name]).abs().max() <= 1e-9 * value.abs().max(), name
