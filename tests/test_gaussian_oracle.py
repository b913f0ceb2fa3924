"""JVP, loss and sampler against the closed form of Gaussian data, in float64."""

from itertools import pairwise

import pytest
import torch

from mf_lightning import draws
from mf_lightning.draws import Stream
from mf_lightning.flow import (
    AdaptiveWeight,
    AverageSampler,
    CountedPasses,
    Draw,
    EulerSampler,
    GaussianFlow,
    MeanFlowLoss,
    sample,
    time_grid,
    total_derivative,
    u_target,
)
from mf_lightning.flow.path import interpolate, per_row

S = 0.6
FLOW = GaussianFlow(S)


def batch(n: int, seed: int = 0):
    rows = torch.arange(n)
    u = draws.uniform(seed, Stream.TIMES, step=0, rows=rows, count=2)
    t, r = u.max(1).values, u.min(1).values
    x, e = draws.normal(seed, Stream.NOISE, step=0, rows=rows, shape=(2, 3, 4, 4), dtype=torch.float64).unbind(1)
    return S * x, e, t, r


def test_average_velocity_is_the_mean_of_the_velocity_along_the_flow():
    x, e, t, r = batch(4)
    z_t = interpolate(x, e, t=t)
    nodes, weights = (torch.from_numpy(a) for a in __import__("numpy").polynomial.legendre.leggauss(40))
    total = torch.zeros_like(z_t)
    for node, weight in zip(nodes, weights, strict=True):
        s = r + (t - r) * (node + 1) / 2
        total += weight / 2 * FLOW.velocity(FLOW.transport(z_t, t=t, r=s), t=s)
    assert (FLOW(z_t, t=t, r=r) - total).abs().max() < 1e-12


def test_limit_at_r_equals_t_is_the_velocity():
    x, e, t, _ = batch(8)
    z_t = interpolate(x, e, t=t)
    assert (FLOW(z_t, t=t, r=t) - FLOW.velocity(z_t, t=t)).abs().max() < 1e-14


def identity_error(tangent) -> float:
    """Largest error of ``u = v - (t - r) du/dt`` with du/dt along ``tangent(v, 1) = (dz, dr, dt)``."""
    x, e, t, r = batch(64)
    z_t = interpolate(x, e, t=t)
    v = FLOW.velocity(z_t, t=t)
    dz, dr, dt = tangent(v, torch.ones_like(t))
    _, dudt = torch.func.jvp(lambda z, r, t: FLOW(z, t=t, r=r), (z_t, r, t), (dz, dr, dt))
    return (FLOW(z_t, t=t, r=r) - u_target(v, dudt, t=t, r=r)).abs().max().item()


def test_identity_holds_with_the_right_tangent():
    assert identity_error(lambda v, one: (v, 0 * one, one)) < 1e-14


@pytest.mark.parametrize("wrong", [(0, 0, 1), (1, 1, 0), (1, 1, 1), (1, 0, 0)])
def test_identity_fails_loudly_with_a_wrong_tangent(wrong):
    dz, dr, dt = wrong
    assert identity_error(lambda v, one: (dz * v, dr * one, dt * one)) > 0.1


def test_total_derivative_is_the_right_tangent():
    x, e, t, r = batch(16)
    z_t = interpolate(x, e, t=t)
    v = FLOW.velocity(z_t, t=t)
    dudt = total_derivative(FLOW, z_t, v, t=t, r=r, y=None)
    assert not dudt.requires_grad
    assert (FLOW(z_t, t=t, r=r) - u_target(v, dudt, t=t, r=r)).abs().max() < 1e-14


def test_loss_with_the_marginal_velocity_is_zero(monkeypatch):
    x, e, t, r = batch(64)
    marginal = FLOW.velocity(interpolate(x, e, t=t), t=t)
    monkeypatch.setattr("mf_lightning.flow.meanflow.conditional_velocity", lambda x, e: marginal)
    terms = MeanFlowLoss()(FLOW, x, None, Draw(e=e, t=t, r=r, dropped=torch.zeros(64, dtype=torch.bool)))
    assert terms.raw_error.max() < 1e-26
    assert terms.dudt_norm.min() > 0


def test_loss_with_the_conditional_velocity_has_its_known_mean():
    """Per dimension the raw error of the exact u is S^2 s(r)^2 / s(t)^4, from the variance of v_t given z_t."""
    n = 4000
    t, r = torch.full((n,), 0.7, dtype=torch.float64), torch.full((n,), 0.2, dtype=torch.float64)
    x, e, _, _ = batch(n, seed=3)
    terms = MeanFlowLoss()(FLOW, x, None, Draw(e=e, t=t, r=r, dropped=torch.zeros(n, dtype=torch.bool)))
    per_dimension = terms.raw_error / x[0].numel()
    expected = S**2 * FLOW.scale(r[:1]) ** 2 / FLOW.scale(t[:1]) ** 4
    spread = per_dimension.std() / n**0.5
    assert (per_dimension.mean() - expected).abs() < 4 * spread
    assert spread < 0.01 * expected


def test_one_jump_gives_the_data_and_four_jumps_equal_one():
    noise = draws.normal(0, Stream.SAMPLE_NOISE, step=0, rows=torch.arange(5000), shape=(1, 2, 2), dtype=torch.float64)
    one = sample(FLOW, noise, y=None, grid=time_grid(1))
    assert (one - S * noise).abs().max() < 1e-14  # so N(0, 1) becomes N(0, S^2) exactly
    for num_steps in (2, 3, 4, 7):
        assert (sample(FLOW, noise, y=None, grid=time_grid(num_steps)) - one).abs().max() < 1e-14


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_passes_are_counted(num_steps):
    counted = CountedPasses(FLOW)
    sample(counted, torch.randn(3, 1, 2, 2), y=None, grid=time_grid(num_steps))
    assert counted.passes == num_steps


def test_two_steps_pass_through_the_half():
    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    seen = []

    def net(z, *, t, r, y):
        seen.append((t[0].item(), r[0].item()))
        return FLOW(z, t=t, r=r)

    sample(net, noise, y=None, grid=time_grid(2))
    assert seen == [(1.0, 0.5), (0.5, 0.0)]


def test_euler_converges_at_first_order_and_asks_for_the_velocity_only():
    """The instantaneous velocity has no h in it, so one step is far off and the error halves with the step."""
    noise = torch.randn(16, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def velocity(z, *, t, r, y):
        assert torch.equal(t, r)
        return FLOW.velocity(z, t=t)

    def error(num_steps):
        made = sample(velocity, noise, y=None, grid=time_grid(num_steps), sampler=EulerSampler())
        return (made - S * noise).norm() / noise.norm()

    errors = [error(num_steps).item() for num_steps in (1, 64, 128, 256, 512)]
    for coarse, fine in pairwise(errors[1:]):
        assert coarse / fine == pytest.approx(2, rel=0.05)
    assert errors[0] > 20 * errors[-1]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_each_sampler_takes_one_pass_per_jump(num_steps):
    for sampler in (AverageSampler(), EulerSampler()):
        counted = CountedPasses(FLOW)
        sample(counted, torch.randn(3, 1, 2, 2), y=None, grid=time_grid(num_steps), sampler=sampler)
        assert counted.passes == num_steps


def test_weight_does_not_change_the_raw_error():
    x, e, t, r = batch(8)
    draw = Draw(e=e, t=t, r=r, dropped=torch.zeros(8, dtype=torch.bool))
    plain = MeanFlowLoss(weight=AdaptiveWeight(norm_p=0))(FLOW, x, None, draw)
    weighted = MeanFlowLoss()(FLOW, x, None, draw)
    assert torch.equal(plain.raw_error, weighted.raw_error)
    assert plain.loss == plain.raw_error.mean()
    assert torch.allclose(weighted.loss, (weighted.raw_error / (weighted.raw_error + 0.01)).mean())
    assert per_row(t, x).shape == (8, 1, 1, 1)
