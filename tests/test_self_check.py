"""The self-check sees a broken tangent and stops the run; off, it says so."""

import pytest
import torch

from mf_lightning.callbacks.self_check import central_differences, fill_zeros
from mf_lightning.cli import load
from mf_lightning.flow import GaussianFlow, MeanFlowLoss
from mf_lightning.nets import SiT, dual
from mf_lightning.types import LatentSpec, UserError
from tests.nets import SHAPE, tiny_sit
from tests.runs import RECIPES

SHORT = ["trainer.max_steps=1", "trainer.limit_val_batches=0", "trainer.enable_progress_bar=false", "sample_eval.num_samples=0"]


def fit(root, *options: str):
    settings = [f"--{option}" for option in (*SHORT, *options)]
    cli = load(["--config", str(RECIPES / "smoke.yaml"), f"--trainer.default_root_dir={root}", *settings])
    cli.trainer.fit(cli.model, cli.datamodule)
    return next(callback for callback in cli.trainer.callbacks if type(callback).__name__ == "SelfCheck"), cli


def test_it_measures_and_changes_nothing(tmp_path):
    check, one = fit(tmp_path / "on")
    assert 0 < check.errors["du/dt"] < 1e-4
    _, other = fit(tmp_path / "off", "self_check.enabled=false")
    for a, b in zip(one.model.net.parameters(), other.model.net.parameters(), strict=True):
        assert torch.equal(a, b)


def attention_without_dv(q, k, v, scale):
    return ATTENTION(q, k, dual.Dual(v.x, torch.zeros_like(v.dx)), scale)


ATTENTION = dual.attention_tangent
BROKEN = {
    "attention": ("attention_tangent", attention_without_dv),
    "gate": ("add_gated", lambda x, g, b: dual.Dual(x.x + g.x[:, None] * b.x, None if x.dx is None else x.dx + b.dx)),
    "layer norm": ("layer_norm", lambda layer, x: dual.Dual(layer(x.x), x.dx)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tangent_stops_the_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(dual, *BROKEN[name])
    with pytest.raises(UserError, match=r"du/dt against central differences has a relative error of .*expected at most 0.001"):
        fit(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_off_it_lets_a_broken_tangent_through_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dual, *BROKEN["attention"])
    with caplog.at_level("INFO"):
        check, _ = fit(tmp_path, "self_check.enabled=false")
    assert check.errors == {}
    assert any("Self-check is off (self_check.enabled = false)" in record.message for record in caplog.records)


def test_another_precision_is_compared_too(tmp_path):
    check, _ = fit(tmp_path, "trainer.precision=bf16-mixed")
    assert check.errors["du/dt"] < 1e-4  # float32 against central differences
    assert 1e-4 < check.errors["du/dt as it will run"] < 0.15


def test_a_fresh_network_would_be_compared_with_zero():
    fresh = SiT(LatentSpec(SHAPE, 4), patch_size=4, depth=2, hidden_size=16, num_heads=2)
    x, t = torch.randn(2, *SHAPE), torch.tensor([0.9, 0.5])
    assert fresh(x, t=t, r=t, y=torch.tensor([0, 1])).abs().max() == 0
    filled = fill_zeros(fresh)
    assert all(bool(p.any()) for p in filled.parameters())
    assert filled(x, t=t, r=t, y=torch.tensor([0, 1])).abs().max() > 0.01


def test_central_differences_are_those_of_the_closed_form():
    class Oracle(torch.nn.Module):
        def forward(self, z, *, t, r, y):
            return GaussianFlow(0.7)(z, t=t, r=r)

    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, *SHAPE, generator=g)
    loss = MeanFlowLoss(fm_fraction=0.0)
    draw = loss.draw_training(x, torch.arange(4), seed=0, step=0, global_batch_size=4)
    draw.t, draw.r = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    terms = loss(Oracle(), x.double(), None, draw)
    exact = central_differences(Oracle(), x, None, draw, terms.v_g)
    assert (exact - terms.dudt).norm() < 1e-6 * terms.dudt.norm()


def test_settings_are_checked():
    from mf_lightning.callbacks import SelfCheck

    with pytest.raises(UserError, match=r"self_check\.rows = 0"):
        SelfCheck(rows=0)
    assert tiny_sit().own_tangents
