"""Loss, derivative and samplers know nothing of pictures: the same numbers in another shape give the same numbers."""

import math

import pytest
import torch

from mf_lightning.flow import EulerSampler, GaussianFlow, Guidance, MeanFlowLoss, sample, time_grid, total_derivative
from mf_lightning.nets import MLP
from mf_lightning.types import LatentSpec
from tests.nets import randomise

SHAPES = [(), (6,), (2, 3), (2, 3, 1), (1, 2, 1, 3)]
B = 16


def data(shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((B, math.prod(shape)), generator=generator, dtype=torch.float64).reshape(B, *shape)


def mlp(shape: tuple[int, ...], num_classes: int = 3) -> MLP:
    return randomise(MLP(LatentSpec(shape, num_classes), hidden_size=16, depth=2).double(), std=0.3)


def terms_of(shape: tuple[int, ...]):
    net, loss = mlp(shape), MeanFlowLoss(guidance=Guidance(omega=1.0, kappa=0.5))
    x, rows = data(shape), torch.arange(B)
    draw = loss.draw_training(x, rows, seed=0, step=0, global_batch_size=B)
    terms = loss(net, x, rows % 3, draw, y_null=net.y_null)
    terms.loss.backward()
    return terms, torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_of_any_shape_is_that_of_pictures(shape):
    terms, gradient = terms_of(shape)
    picture, expected = terms_of((math.prod(shape), 1, 1))
    assert terms.dudt.shape == (B, *shape)
    assert float(terms.dudt_norm.max()) > 1e-3  # the derivative is not trivially zero
    assert torch.allclose(terms.raw_error, picture.raw_error, rtol=1e-12, atol=1e-14)
    assert torch.allclose(terms.dudt.flatten(), picture.dudt.flatten(), rtol=1e-12, atol=1e-14)
    assert torch.allclose(gradient, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_validation_draws_of_any_shape(shape):
    draw = MeanFlowLoss().draw_validation(data(shape), torch.arange(B), seed=0)
    assert draw.e.shape == (B, *shape)
    assert torch.equal(
        draw.e.flatten(), MeanFlowLoss().draw_validation(data((math.prod(shape),)), torch.arange(B), seed=0).e.flatten()
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_form_and_samplers_of_any_shape(shape):
    flow, z_1 = GaussianFlow(0.5), data(shape)
    assert torch.allclose(sample(flow, z_1, y=None, grid=time_grid(1)), 0.5 * z_1, atol=1e-14)
    assert torch.allclose(sample(flow, z_1, y=None, grid=time_grid(4)), 0.5 * z_1, atol=1e-14)
    euler = sample(flow, z_1, y=None, grid=time_grid(4), sampler=EulerSampler())
    assert euler.shape == z_1.shape
    assert not torch.allclose(euler, 0.5 * z_1, atol=1e-2)
    t, r = torch.full((B,), 0.9, dtype=torch.float64), torch.full((B,), 0.2, dtype=torch.float64)
    dudt = total_derivative(flow, z_1, flow.velocity(z_1, t=t), t=t, r=r, y=None)
    identity = flow.velocity(z_1, t=t) - 0.7 * dudt
    assert torch.allclose(flow(z_1, t=t, r=r), identity, atol=1e-12)


def test_mlp_without_labels_starts_at_zero():
    net = MLP(LatentSpec((5,), 0), hidden_size=8, depth=1)
    t = torch.rand(B)
    assert net.y_null is None
    assert torch.equal(net(torch.randn(B, 5), t=t, r=t), torch.zeros(B, 5))
