"""The host never waits for the device inside a step: nothing reads a value there, whatever the draw."""

import traceback
from collections import Counter

import pytest
import torch
from lightning import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from mf_lightning.callbacks import NonFiniteGuard
from mf_lightning.cli import load
from mf_lightning.flow import DropAnyRow, Guidance, MeanFlowLoss, Passes
from tests.nets import SHAPE, tiny_sit
from tests.runs import RECIPES

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
ON_THE_CPU = {  # these read the draw, which lives there, the guard's own copy, or Adam's step count
    "check_times", "order", "_guide", "velocity_rows", "count_jumps", "_log_terms", "settle", "optimizer_step",
}  # fmt: skip


@pytest.mark.parametrize("jvp", ["network", "torch"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(omega=2.0), Guidance(kappa=0.5, interval=(0.2, 0.8))], ids=str)
@pytest.mark.parametrize("order", [None, torch.arange(15, -1, -1)])
def test_loss_and_backward_read_no_value(jvp, guidance, order):
    """Tensors on the meta device have no values: reading one raises."""
    net = tiny_sit(dtype=torch.float32).to("meta")
    x, y = torch.empty(16, *SHAPE, device="meta"), torch.empty(16, dtype=torch.int64, device="meta")
    loss = MeanFlowLoss(guidance=guidance, label_drop=DropAnyRow(0.3), jvp=jvp)
    rows = torch.arange(16) if order is None else order
    draw = loss.draw_training(x, rows, seed=0, step=0, global_batch_size=16)
    for passes in (Passes(), Passes(fixed_sizes=True)):
        terms = loss(net, x, y, draw, y_null=4, passes=passes)
        terms.loss.backward()
        assert all(p.grad.is_meta for p in net.parameters())
    with pytest.raises(RuntimeError):
        terms.loss.item()


def test_every_copy_to_the_device_goes_through_pinned_memory(monkeypatch):
    """A plain ``.to`` of a CPU tensor makes the host wait until a GPU has caught up; ``transfer.to_device`` does not."""
    net = tiny_sit(dtype=torch.float32).to("meta")
    x, y = torch.empty(16, *SHAPE, device="meta"), torch.empty(16, dtype=torch.int64, device="meta")
    loss = MeanFlowLoss(guidance=Guidance(kappa=0.5), label_drop=DropAnyRow(0.3))
    plain_to, copies = torch.Tensor.to, Counter()

    def watched(value, *args, **kwargs):
        out = plain_to(value, *args, **kwargs)
        if out.is_meta and not value.is_meta:
            copies[traceback.extract_stack()[-2].name] += 1
        return out

    monkeypatch.setattr(torch.Tensor, "to", watched)
    order = torch.arange(15, -1, -1)
    draw = loss.draw_training(x, order, seed=0, step=0, global_batch_size=16)
    loss(net, x, y, draw, y_null=4).loss.backward()
    assert copies["to_device"] >= 6
    assert set(copies) == {"to_device"}


class Reads(TorchDispatchMode):
    """Counts operations that bring a value to the host, by the first function outside torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in READS):
            stack = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            self.found[stack[-1].name] += 1
        return func(*args, **(kwargs or {}))


class Between(Callback):
    """Watches whole steps that are not logged."""

    def __init__(self) -> None:
        self.reads = Reads()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            self.reads.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            self.reads.__exit__(None, None, None)


@pytest.mark.parametrize("bar", ["true", "false"])
def test_steps_between_two_logs_read_no_value(tmp_path, bar):
    options = {
        "trainer.default_root_dir": tmp_path,
        "trainer.max_steps": 8,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": bar,
        "trainer.gradient_clip_val": 1.0,
        "sample_eval.num_samples": 0,
    }
    cli = load(["--config", str(RECIPES / "smoke.yaml"), *(f"--{key}={value}" for key, value in options.items())])
    between = Between()
    cli.trainer.callbacks.append(between)
    next(callback for callback in cli.trainer.callbacks if isinstance(callback, NonFiniteGuard)).deferred = True
    cli.trainer.fit(cli.model, cli.datamodule)
    assert between.reads.found["check_times"] == 5  # the watch sees reads
    assert set(between.reads.found) <= ON_THE_CPU
