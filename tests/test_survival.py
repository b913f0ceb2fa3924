"""What must not be lost: checkpoints on a full disk, weights at a NaN."""

import resource
from types import SimpleNamespace

import pytest
import torch

from mf_lightning.callbacks import AtomicCheckpointIO, NonFiniteGuard
from mf_lightning.types import UserError
from tests.runs import RECIPES, error_of, python

SMOKE = ("--config", RECIPES / "smoke.yaml")

NAN_AT_STEP_12 = """
import sys, torch
from lightning import Callback
from mf_lightning import cli

class Spoil(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 12:
            batch.x[3] = float("nan")

add = cli.MeanFlowCLI.add_arguments_to_parser


def with_spoil(self, parser):
    add(self, parser)
    parser.add_lightning_class_args(Spoil, "spoil")

cli.MeanFlowCLI.add_arguments_to_parser = with_spoil
cli.main(sys.argv[1:])
"""


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    root = tmp_path / "run"
    settings = ["--trainer.val_check_interval=10", "--sample_eval.num_samples=0", "--sample_grid.rows=0"]
    result = python("-c", NAN_AT_STEP_12, "fit", *SMOKE, f"--trainer.default_root_dir={root}", *settings)
    message = error_of(result)
    last = root / "checkpoints" / "last.ckpt"
    assert "step 12" in message
    assert "rows [3]" in message
    assert str(last) in message
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 10
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def step_of(guard: NonFiniteGuard, step: int, *, loss: float = 1.0, norm: float = 1.0) -> SimpleNamespace:
    """Show the guard one optimizer step; the trainer is returned."""
    trainer = SimpleNamespace(global_step=step, global_rank=0, default_root_dir="nowhere")
    module = SimpleNamespace(
        last_terms=SimpleNamespace(raw_error=torch.tensor([1.0, loss])), gradient_norm=lambda: torch.tensor(norm)
    )
    guard.on_before_backward(trainer, module, torch.tensor(loss))
    guard.on_before_optimizer_step(trainer, module, None)
    return trainer


def test_guard_stops_at_a_gradient_that_is_not_finite():
    guard = NonFiniteGuard()
    step_of(guard, 4)
    with pytest.raises(UserError, match=r"gradient of norm inf at step 5, process 0, largest raw error 1"):
        step_of(guard, 5, norm=float("inf"))


def test_on_a_gpu_the_guard_reads_a_step_later_and_before_anything_is_kept():
    guard = NonFiniteGuard(deferred=True)  # as on a GPU
    module = SimpleNamespace(device=torch.device("cpu"))
    guard.on_train_start(SimpleNamespace(global_rank=0, default_root_dir="nowhere"), module)
    step_of(guard, 4)
    step_of(guard, 5, loss=float("nan"))
    with pytest.raises(UserError, match=r"loss of nan at step 5, process 0, rows \[1\]"):
        step_of(guard, 6)
    saving = lambda trainer, module_: module.before_saving()  # noqa: E731
    for keep in (saving, guard.on_validation_start, guard.on_train_end):
        guard.on_train_start(SimpleNamespace(global_rank=0, default_root_dir="nowhere"), module)
        trainer = step_of(guard, 7, norm=float("nan"))
        with pytest.raises(UserError, match=r"gradient of norm nan at step 7"):
            keep(trainer, None)


def test_the_guard_names_rows_of_every_accumulated_batch():
    guard = NonFiniteGuard(deferred=True)
    trainer = SimpleNamespace(global_step=3, global_rank=0, default_root_dir="nowhere")
    for error in (float("nan"), 2.0):
        terms = SimpleNamespace(raw_error=torch.tensor([1.0, error]))
        module = SimpleNamespace(last_terms=terms, gradient_norm=lambda: torch.tensor(float("nan")))
        guard.on_before_backward(trainer, module, torch.tensor(error))
    guard.on_before_optimizer_step(trainer, module, None)
    with pytest.raises(UserError, match=r"loss of nan at step 3, process 0, rows \[1\]"):
        guard.settle(trainer)


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path):
    """A file-size limit makes the write fail in the middle, as a full disk does."""
    import signal

    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"global_step": 1, "x": torch.ones(10)}, path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"Got no checkpoint written .* is still whole"):
            io.save_checkpoint({"global_step": 2, "x": torch.ones(1_000_000)}, path)
        with pytest.raises(UserError, match="Nothing was written"):
            io.save_checkpoint({"global_step": 2, "x": torch.ones(1_000_000)}, tmp_path / "other.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert io.load_checkpoint(path)["global_step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"x": Evil()}))
    torch.save({"x": Evil()}, tmp_path / "evil2.ckpt")
    for name in ("evil.ckpt", "evil2.ckpt"):
        with pytest.raises(UserError, match="cannot be read"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / name)
    assert not (tmp_path / "made").exists()
