"""Each function on dual numbers, and the whole network, against torch.func.jvp."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mf_lightning.flow import Guidance, MeanFlowLoss, total_derivative
from mf_lightning.nets import dual
from mf_lightning.nets.dual import Dual
from tests.nets import SHAPE, tiny_sit

B, J, T, D = 5, 2, 6, 8
G = torch.Generator()


def numbers(*shape: int, tangent: bool = True) -> Dual:
    x = torch.randn(*shape, generator=G, dtype=torch.float64)
    return Dual(x, torch.randn(J, *shape[1:], generator=G, dtype=torch.float64) if tangent else None)


AFFINE = nn.LayerNorm(D).double()
nn.init.normal_(AFFINE.weight)
nn.init.normal_(AFFINE.bias)
LINEAR = nn.Linear(D, 3).double()
TOKENS, VECTOR, HEADS = (B, T, D), (B, D), (B, 2, T, D)
FUNCTIONS = {
    "same": (lambda x: dual.same(lambda a: a.transpose(1, 2), x), [TOKENS]),
    "linear": (lambda x: dual.linear(LINEAR, x), [TOKENS]),
    "silu": (dual.silu, [TOKENS]),
    "gelu": (dual.gelu_tanh, [TOKENS]),
    "layer norm": (lambda x: dual.layer_norm(nn.LayerNorm(D, elementwise_affine=False, eps=1e-6), x), [TOKENS]),
    "affine layer norm": (lambda x: dual.layer_norm(AFFINE, x), [TOKENS]),
    "modulate": (dual.modulate, [TOKENS, VECTOR, VECTOR]),
    "gate": (dual.add_gated, [TOKENS, VECTOR, TOKENS]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_tangent_of_each_function(name):
    function, shapes = FUNCTIONS[name]
    G.manual_seed(0)
    inputs = [numbers(*shape) for shape in shapes]
    out = function(*inputs)
    plain = function(*(Dual(value.x) for value in inputs))
    assert plain.dx is None
    assert torch.equal(out.x, plain.x)
    rows, tangents = tuple(value.rows for value in inputs), tuple(value.dx for value in inputs)
    _, expected = torch.func.jvp(lambda *xs: function(*map(Dual, xs)).x, rows, tangents)
    assert expected.abs().max() > 0.1
    assert (out.dx - expected).abs().max() < 1e-13
    assert not out.dx.requires_grad


def test_tangent_of_attention():
    G.manual_seed(0)
    q, k, v = (numbers(*HEADS) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, expected = torch.func.jvp(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (q.rows, k.rows, v.rows), (q.dx, k.dx, v.dx)
        )
    assert (dual.attention_tangent(q, k, v, D**-0.5) - expected).abs().max() < 1e-13


@pytest.mark.parametrize("time_inputs", ["t,h", "t,r", "t,r,h", "h"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_networks_tangents_are_those_of_torch(time_inputs, qk_norm, rows):
    net = tiny_sit(time_inputs=time_inputs, qk_norm=qk_norm)
    G.manual_seed(1)
    z = torch.randn(5, *SHAPE, generator=G, dtype=torch.float64)
    v = torch.randn(5, *SHAPE, generator=G, dtype=torch.float64)
    t = torch.rand(5, generator=G, dtype=torch.float64)
    r, y = t * 0.3, torch.tensor([0, 1, 2, 3, 4])
    u, dudt = net(z, t=t, r=r, y=y, v_g=v[-rows:])
    assert torch.equal(u, net(z, t=t, r=r, y=y))
    expected = total_derivative(net, z[-rows:], v[-rows:], t=t[-rows:], r=r[-rows:], y=y[-rows:])
    assert (dudt - expected).abs().max() < 1e-12 * expected.abs().max()
    assert u.requires_grad
    assert not dudt.requires_grad


def test_an_unconditional_network_and_plain_attention_have_the_same_tangents():
    z = torch.randn(3, *SHAPE, generator=G.manual_seed(2), dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64)
    fused, plain = (tiny_sit(num_classes=0, attention=attention) for attention in ("fused", "math"))
    for net in (fused, plain):
        _, dudt = net(z, t=t, r=t / 2, y=None, v_g=z)
        expected = total_derivative(fused, z, z, t=t, r=t / 2, y=None)
        assert (dudt - expected).abs().max() < 1e-12 * expected.abs().max()


def test_gradients_do_not_see_the_tangents():
    net = tiny_sit()
    z = torch.randn(4, *SHAPE, generator=G.manual_seed(3), dtype=torch.float64)
    t, y = torch.full((4,), 0.7, dtype=torch.float64), torch.arange(4)
    gradients = []
    for v_g in (None, z[:2]):
        u = net(z, t=t, r=t / 2, y=y, v_g=v_g)
        net.zero_grad()
        (u if v_g is None else u[0]).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def saved_bytes(run) -> int:
    """Return what autograd keeps for the backward pass of ``run()``, each storage once, leaves (parameters) left out."""
    kept = {}

    def pack(value):
        if not (value.is_leaf and value.requires_grad):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("with_tangents", [False, True])
def test_activation_checkpointing_keeps_less_and_changes_nothing(with_tangents, monkeypatch):
    z = torch.randn(4, *SHAPE, generator=G.manual_seed(3), dtype=torch.float64)
    t, y = torch.full((4,), 0.7, dtype=torch.float64), torch.arange(4)
    calls, tangent = [], dual.attention_tangent
    monkeypatch.setattr(dual, "attention_tangent", lambda *args: calls.append(1) or tangent(*args))
    results, kept = [], []
    for checkpointing in (False, True):
        net = tiny_sit(activation_checkpointing=checkpointing)
        out = []

        def run(net=net, out=out):
            out.append(net(z, t=t, r=t / 2, y=y, **({"v_g": z[:2]} if with_tangents else {})))

        kept.append(saved_bytes(run))
        calls.clear()
        run()
        u, dudt = out[-1] if with_tangents else (out[-1], torch.zeros(()))
        u.square().sum().backward()
        assert len(calls) == (2 if with_tangents else 0)  # one per block: the second run has no tangents
        results.append([u.detach(), dudt, *(p.grad.clone() for p in net.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_a_meanflow_step_keeps_no_more_than_a_flow_matching_step():
    net = tiny_sit(hidden_size=64, depth=4, num_heads=4)
    x = torch.randn(16, *SHAPE, generator=G.manual_seed(4), dtype=torch.float64)
    y, kept = torch.arange(16) % 4, {}
    for name, loss in {
        "flow matching": MeanFlowLoss(fm_fraction=1.0),
        "network": MeanFlowLoss(guidance=Guidance(kappa=0.5)),
        "torch": MeanFlowLoss(guidance=Guidance(kappa=0.5), jvp="torch"),
    }.items():
        draw = loss.draw_training(x, torch.arange(16), seed=0, step=0, global_batch_size=16)
        kept[name] = saved_bytes(lambda loss=loss, draw=draw: loss(net, x, y, draw, y_null=4))
    assert kept["network"] <= 1.05 * kept["flow matching"]
    assert kept["torch"] <= 1.05 * kept["flow matching"]
