"""EMA against its closed form, swapped in and out, and through a checkpoint."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mf_lightning.callbacks import EMA
from mf_lightning.types import UserError


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2, bias=False)
        self.net.register_buffer("fixed", torch.ones(1))
        self.device = torch.device("cpu")
        self.compiled = False


def trainer(step: int = 0, training: bool = True):
    return SimpleNamespace(global_step=step, training=training)


def run(ema: EMA, module: Module, values: list[float]) -> None:
    ema.on_fit_start(trainer(), module)
    ema.on_train_start(trainer(), module)
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            module.net.weight.fill_(value)
        ema.on_train_batch_end(trainer(step), module, None, None, 0)


def test_closed_form_of_several_decays():
    module, values = Module(), [1.0, -2.0, 3.0]
    with torch.no_grad():
        module.net.weight.fill_(5.0)
    ema = EMA(decays=[0.5, 0.9])
    run(ema, module, values)
    for d in (0.5, 0.9):
        expected = d**3 * 5 + (1 - d) * sum(d ** (2 - k) * v for k, v in enumerate(values))
        assert torch.allclose(ema.weights[d]["weight"], torch.tensor(expected))
    assert ema.updates == 3
    assert list(ema.weights[0.5]) == ["weight"]  # parameters only


def test_warmup_is_min_of_decay_and_its_ramp():
    module = Module()
    with torch.no_grad():
        module.net.weight.fill_(0.0)
    ema = EMA(decays=[0.2], warmup=True)
    run(ema, module, [1.0, 1.0, 1.0])
    value = 0.0
    for n in range(3):
        d = min(0.2, (1 + n) / (10 + n))
        value = d * value + (1 - d)
    assert torch.allclose(ema.weights[0.2]["weight"], torch.tensor(value))


def test_accumulated_batches_do_not_update():
    module, ema = Module(), EMA(decays=[0.5])
    ema.on_fit_start(trainer(), module)
    for step in (0, 0, 1, 1, 2):
        ema.on_train_batch_end(trainer(step), module, None, None, 0)
    assert ema.updates == 2


def test_weights_are_swapped_in_and_come_back_also_after_an_error():
    module, ema = Module(), EMA(decays=[0.5], on_cpu=True)
    run(ema, module, [1.0, 2.0])
    raw, average = module.net.weight.data_ptr(), ema.weights[0.5]["weight"].clone()
    with ema.applied(module, 0.5):
        assert torch.equal(module.net.weight, average)
    assert torch.equal(ema.weights[0.5]["weight"], average)
    with ema.applied(module, None):
        assert (module.net.weight == 2).all()

    def fail():
        with ema.applied(module, 0.5):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert module.net.weight.data_ptr() == raw
    assert (module.net.weight == 2).all()
    with (
        pytest.raises(UserError, match=r"EMA of decay 0.7, expected one that exists: \[0.5\]"),
        ema.applied(module, 0.7),
    ):
        pass


def test_a_checkpoint_restores_bitwise(tmp_path):
    module, ema = Module(), EMA(decays=[0.5, 0.999])
    run(ema, module, [0.1, 0.7, -3.3])
    checkpoint: dict = {}
    ema.on_save_checkpoint(trainer(), module, checkpoint)
    torch.save(checkpoint, tmp_path / "c.ckpt")
    loaded = torch.load(tmp_path / "c.ckpt", weights_only=True)
    fresh = EMA(decays=[0.999, 0.5])
    fresh.on_load_checkpoint(trainer(), module, loaded)
    fresh.on_fit_start(trainer(3), Module())
    assert fresh.updates == 3
    for decay in (0.5, 0.999):
        assert torch.equal(fresh.weights[decay]["weight"], ema.weights[decay]["weight"])


def test_other_decays_than_the_checkpoints_are_refused_in_training_only():
    module, ema = Module(), EMA(decays=[0.5])
    run(ema, module, [1.0])
    checkpoint: dict = {}
    ema.on_save_checkpoint(trainer(), module, checkpoint)
    with pytest.raises(UserError, match=r"decays \[0.5\], expected ema.decays = \[0.9\]"):
        EMA(decays=[0.9]).on_load_checkpoint(trainer(), module, checkpoint)
    EMA(decays=[0.9]).on_load_checkpoint(trainer(training=False), module, checkpoint)


@pytest.mark.parametrize("settings", [{"decays": [1.0]}, {"decays": [0.5, 0.5]}, {"decays": [0.5], "use": 0.9}])
def test_settings_are_checked(settings):
    with pytest.raises(UserError, match="expected"):
        EMA(**settings)
