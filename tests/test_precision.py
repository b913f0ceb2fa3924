"""What each precision costs in accuracy, against float64, on the network of the reference numbers or one like it."""

import pytest
import torch

from mf_lightning.flow import Guidance, MeanFlowLoss
from mf_lightning.types import UserError
from tests.nets import SHAPE, tiny_sit
from tests.runs import ROOT
from tests.test_loss import gradients

ORACLES = ROOT.parent / "shared" / "oracles"


def oracle_network() -> torch.nn.Module:
    if not ORACLES.is_dir():
        pytest.skip("the folder of reference numbers is not beside the checkout")
    from tests.parity.family import Family

    return Family(ORACLES).net().double()


def like_it() -> torch.nn.Module:
    return tiny_sit(depth=3, hidden_size=48, num_heads=3, patch_size=2)


def errors(net, *, mixed: bool, jvp_precision: str | None = None, guidance: Guidance = Guidance()) -> dict[str, float]:  # noqa: B008
    """Return relative errors (of norms) against float64."""
    shape = tuple(net.config["latent_shape"])
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(16) % net.y_null
    loss = MeanFlowLoss(fm_fraction=0.5, guidance=guidance)
    draw = loss.draw_training(x, torch.arange(16), seed=0, step=0, global_batch_size=16)
    exact = loss(net, x, y, draw, y_null=net.y_null)
    expected = torch.cat([g.flatten() for g in gradients(net, exact.loss).values()])
    loss = MeanFlowLoss(fm_fraction=0.5, guidance=guidance, jvp_precision=jvp_precision)
    draw.e = draw.e.float()
    net.float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        terms = loss(net, x.float(), y, draw, y_null=net.y_null)
    found = torch.cat([g.flatten() for g in gradients(net, terms.loss).values()])
    net.double()
    pairs = {"u": (terms.u, exact.u), "dudt": (terms.dudt, exact.dudt), "gradient": (found, expected)}
    return {name: float((mine.double() - right).norm() / right.norm()) for name, (mine, right) in pairs.items()}


@pytest.mark.parametrize("make", [oracle_network, like_it])
def test_error_of_each_precision(make):
    net = make()
    full = errors(net, mixed=False)
    assert max(full.values()) < 5e-6
    mixed = errors(net, mixed=True)
    assert all(1e-4 < error < 0.05 for error in mixed.values())
    exact_jvp = errors(net, mixed=True, jvp_precision="32-true")
    assert exact_jvp["dudt"] < 5e-6  # the JVP alone in float32
    assert 1e-4 < exact_jvp["u"] < 0.05
    rough_jvp = errors(net, mixed=False, jvp_precision="bf16-mixed")
    assert rough_jvp["u"] < 5e-6
    assert 1e-4 < rough_jvp["dudt"] < 0.05
    for name, found in {"32": full, "bf16": mixed, "bf16, JVP 32": exact_jvp, "32, JVP bf16": rough_jvp}.items():
        print(f"{name:14}" + "".join(f"{key:>10} {error:.1e}" for key, error in found.items()))


def test_no_gradient_is_lost_to_autocasts_cache():
    """Casts made without gradient (guidance runs first) must not be taken for the gradient forward's."""
    net = tiny_sit(dtype=torch.float32)
    x, y = torch.randn(8, *SHAPE), torch.arange(8) % 4
    loss = MeanFlowLoss(guidance=Guidance(kappa=0.5))
    draw = loss.draw_training(x, torch.arange(8), seed=0, step=0, global_batch_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(net, x, y, draw, y_null=4)
    terms.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_the_residual_stream_of_tangents_is_float32_under_autocast():
    """As that of the values: in bfloat16 it would be rounded again after every block."""
    net = tiny_sit(dtype=torch.float32)
    seen = []
    net.blocks[-1].register_forward_hook(lambda module, inputs, out: seen.append((out.x.dtype, out.dx.dtype)))
    z, t = torch.randn(2, *SHAPE), torch.tensor([0.9, 0.5])
    with torch.autocast("cpu", torch.bfloat16):
        net(z, t=t, r=t / 2, y=torch.tensor([0, 1]), v_g=z)
    assert seen == [(torch.float32, torch.float32)]


def test_times_are_embedded_in_float32():
    net = tiny_sit(dtype=torch.float32)
    t, y = torch.tensor([0.5, 0.50001]), torch.tensor([0, 0])
    exact = net.condition(t=t, r=t / 2, y=y, rows=2)
    with torch.autocast("cpu", torch.bfloat16):
        c = net.condition(t=t, r=t / 2, y=y, rows=2)
    assert c.x.dtype == c.dx.dtype == torch.float32
    assert torch.equal(c.x, exact.x)
    assert torch.equal(c.dx, exact.dx)
    assert not torch.equal(c.x[0], c.x[1])


def test_a_precision_of_the_jvp_needs_float32_data():
    net = tiny_sit()
    x, y = torch.randn(4, *SHAPE, dtype=torch.float64), torch.arange(4)
    loss = MeanFlowLoss(fm_fraction=0.5, jvp_precision="32-true")
    draw = loss.draw_training(x, torch.arange(4), seed=0, step=0, global_batch_size=4)
    with pytest.raises(UserError, match=r"init_args.jvp_precision = 32-true for data in torch.float64, expected float32"):
        loss(net, x, y, draw, y_null=4)
