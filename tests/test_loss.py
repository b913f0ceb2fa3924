"""The fast loss equals the plain one: whole-batch JVP inside the graph, guidance forwards apart, row by row."""

import pytest
import torch
from torch import nn

from mf_lightning.flow import (
    AdaptiveWeight,
    Draw,
    DropAnyRow,
    DropFirstRows,
    Guidance,
    LogitNormal,
    MeanFlowLoss,
    Passes,
    TwoLogitNormals,
    Uniform,
)
from mf_lightning.flow.rows import count_jumps, velocity_rows
from mf_lightning.flow.times import fm_count
from mf_lightning.types import UserError
from tests.nets import SHAPE, tiny_sit

GUIDANCES = [
    Guidance(),
    Guidance(omega=2.0),
    Guidance(omega=1.0, kappa=0.5),
    Guidance(omega=0.2, kappa=0.92, interval=(0.0, 0.75)),
    Guidance(omega=0.5, kappa=0.5),  # no weight on the unconditional velocity
    Guidance(omega=3.0, interval=(0.999, 1.0)),  # acts nowhere here
]


def batch(n: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, n, *SHAPE, generator=g, dtype=torch.float64).to(dtype)
    times = torch.rand(n, 2, generator=g)
    t, r = times.max(1).values, times.min(1).values
    r = torch.where(torch.arange(n) < n // 2, t, r)
    t[n // 4] = r[n // 4] = 0.75  # exactly on an interval's end
    dropped = torch.tensor([True, False, False, False, False, True, False, False])[torch.arange(n) % 8]
    return x, torch.arange(n) % 4, Draw(e=e, t=t, r=r, dropped=dropped)


def naive_loss(loss: MeanFlowLoss, net, x, y, draw, tangent=(1, 0, 1)):
    """The textbook form: one torch.func.jvp over the whole batch inside the graph, every guidance velocity computed."""
    t, r = draw.t.to(x.dtype), draw.r.to(x.dtype)
    t4, r4 = t[:, None, None, None], r[:, None, None, None]
    z, v_t = (1 - t4) * x + t4 * draw.e, draw.e - x
    g, null = loss.guidance, torch.full_like(y, net.y_null)
    with torch.no_grad():
        v_u, v_c = net(z, t=t, r=t, y=null), net(z, t=t, r=t, y=y)
    v_g = g.omega * v_t + g.kappa * v_c + (1 - g.omega - g.kappa) * v_u
    low, high = torch.tensor(g.interval)
    use = ~draw.dropped & (draw.t >= low) & (draw.t <= high)
    v_g = torch.where(use[:, None, None, None], v_g, v_t)
    y_in = torch.where(draw.dropped, null, y)
    dz, dr, dt = tangent
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        u, dudt = torch.func.jvp(
            lambda z, r, t: net(z, t=t, r=r, y=y_in),
            (z, r, t),
            (dz * v_g, dr * torch.ones_like(r), dt * torch.ones_like(t)),
        )
    error = (u - (v_g - (t4 - r4) * dudt).detach()).square().flatten(1).sum(1)
    value = (error / (error.detach() + loss.weight.norm_eps) ** loss.weight.norm_p).mean()
    return value, error.detach(), dudt.detach(), v_g


def gradients(net, value):
    net.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize(("norm_p", "jvp"), [(0.0, "network"), (0.5, "network"), (1.0, "network"), (1.0, "torch")])
def test_fast_loss_equals_the_naive_one(guidance, norm_p, jvp):
    net = tiny_sit()
    x, y, draw = batch()
    loss = MeanFlowLoss(guidance=guidance, weight=AdaptiveWeight(norm_p=norm_p), jvp=jvp)
    terms = loss(net, x, y, draw, y_null=net.y_null)
    fast = gradients(net, terms.loss)
    value, error, dudt, v_g = naive_loss(loss, net, x, y, draw)
    slow = gradients(net, value)
    jump = draw.r < draw.t
    assert terms.dudt_norm[jump].min() > 1e-3  # not 0 compared with 0
    assert torch.allclose(terms.raw_error, error, rtol=1e-10)
    assert torch.allclose(terms.v_g, v_g, rtol=1e-10)
    assert torch.allclose(terms.dudt_norm[jump], dudt.flatten(1).norm(dim=1)[jump], rtol=1e-10)
    assert torch.allclose(terms.loss, value, rtol=1e-10)
    for name, gradient in slow.items():
        assert (fast[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name


@pytest.mark.parametrize("tangent", [(0, 0, 1), (1, 1, 0), (1, 1, 1)])
def test_a_wrong_tangent_shows_in_raw_error_and_gradients_but_not_in_the_weighted_loss(tangent):
    net = tiny_sit(seed=1, std=0.3)
    x, y, draw = batch()
    loss = MeanFlowLoss()
    right, right_error, right_dudt, _ = naive_loss(loss, net, x, y, draw)
    right_gradients = gradients(net, right)
    wrong, wrong_error, wrong_dudt, _ = naive_loss(loss, net, x, y, draw, tangent)
    wrong_gradients = gradients(net, wrong)
    jump = draw.r < draw.t
    assert ((wrong_error - right_error).abs() / right_error)[jump].max() > 1e-3
    assert not torch.allclose(wrong_dudt[jump].flatten(1).norm(dim=1), right_dudt[jump].flatten(1).norm(dim=1), rtol=1e-2)
    name = "x_embedder.proj.weight"
    difference = (wrong_gradients[name] - right_gradients[name]).norm() / right_gradients[name].norm()
    assert difference > 1e-3
    assert abs(wrong.item() - right.item()) < 1e-4  # blind at norm_p = 1: about 1 either way


def test_a_batch_of_eight_is_eight_batches_of_one():
    net = tiny_sit()
    x, y, draw = batch()
    loss = MeanFlowLoss(guidance=Guidance(omega=1.0, kappa=0.5))
    whole = loss(net, x, y, draw, y_null=4)
    for row in range(8):
        one = slice(row, row + 1)
        alone = loss(net, x[one], y[one], Draw(draw.e[one], draw.t[one], draw.r[one], draw.dropped[one]), y_null=4)
        assert torch.allclose(alone.raw_error, whole.raw_error[one], rtol=1e-10)
        assert torch.allclose(alone.dudt_norm, whole.dudt_norm[one], rtol=1e-9)


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
def test_the_order_of_rows_and_the_padding_change_nothing(guidance):
    """r < t rows anywhere in the batch; row counts padded to a few sizes, as under compilation."""
    net = tiny_sit()
    x, y, draw = batch(n=40)
    loss = MeanFlowLoss(guidance=guidance)
    plain = loss(net, x, y, draw, y_null=4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = Draw(draw.e[order], draw.t[order], draw.r[order], draw.dropped[order])
    assert shuffled.order() is not None
    for terms, rows in (
        (loss(net, x[order], y[order], shuffled, y_null=4), order),
        (loss(net, x, y, draw, y_null=4, passes=Passes(fixed_sizes=True)), slice(None)),
    ):
        assert torch.allclose(terms.loss, plain.loss, rtol=1e-10)
        for name in ("raw_error", "velocity_error", "dudt_norm", "u", "u_tgt", "v_g"):
            assert torch.allclose(getattr(terms, name), getattr(plain, name)[rows], rtol=1e-10), name


def test_counts_are_padded_to_few_sizes():
    passes, sizes = Passes(fixed_sizes=True), set()
    loss = MeanFlowLoss(label_drop=DropAnyRow(0.1), guidance=Guidance(omega=1.0, kappa=0.5, interval=(0.1, 0.9)))
    for step in range(200):
        draw = loss.draw_training(torch.zeros(256, 1, 2, 2), torch.arange(256), seed=0, step=step, global_batch_size=256)
        guided = ~draw.dropped & loss.guidance.acts_at(draw.t)
        plan = velocity_rows(guided, guided & draw.jumps, loss.guidance, passes)
        exact = velocity_rows(guided, guided & draw.jumps, loss.guidance, Passes())
        assert len(exact.rows) <= len(plan.rows) < len(exact.rows) + 32
        sizes.add((count_jumps(draw, passes), len(plan.rows)))
    assert len(sizes) <= 3
    assert passes.padded(0, 256, parts=8) == 0


def test_the_target_is_continuous_at_r_equals_t():
    net = tiny_sit()
    x, y, draw = batch()
    loss = MeanFlowLoss(guidance=Guidance(omega=2.0))
    at = loss(net, x, y, Draw(draw.e, draw.t, draw.t, draw.dropped), y_null=4)
    near = loss(net, x, y, Draw(draw.e, draw.t, draw.t - 1e-5, draw.dropped), y_null=4)
    assert (at.dudt_norm == 0).all()  # no derivative is paid for
    assert torch.allclose(at.u_tgt, near.u_tgt, atol=1e-4)


def test_fm_fraction_one_is_plain_flow_matching():
    net = tiny_sit(num_classes=0)
    x, _, _ = batch()
    loss = MeanFlowLoss(fm_fraction=1.0, weight=AdaptiveWeight(norm_p=0))
    draw = loss.draw_training(x, torch.arange(8), seed=0, step=0, global_batch_size=8)
    terms = loss(net, x, None, draw)
    t = draw.t.double()
    t4 = t[:, None, None, None]
    u = net((1 - t4) * x + t4 * draw.e, t=t, r=t, y=None)
    assert torch.allclose(terms.loss, (u - (draw.e - x)).square().flatten(1).sum(1).mean())
    assert torch.equal(terms.raw_error, terms.velocity_error)


def test_forward_passes_are_only_those_needed():
    """One call without gradient on guided rows, one gradient forward of the batch with tangents on the r != t rows."""
    net = tiny_sit()
    x, y, draw = batch()
    calls = []

    def count(module, args, kwargs):
        tangents = kwargs.get("v_g")
        calls.append((len(args[0]), 0 if tangents is None else len(tangents), torch.is_grad_enabled()))

    net.register_forward_pre_hook(count, with_kwargs=True)
    guided = int((~draw.dropped).sum())
    guided_jumps = int((~draw.dropped & (draw.r < draw.t)).sum())
    for jvp, passes in (("network", [(8, 4, True)]), ("torch", [(8, 0, True), (4, 0, False)])):
        calls.clear()
        MeanFlowLoss(jvp=jvp)(net, x, y, draw, y_null=4)
        assert calls == passes
        calls.clear()
        MeanFlowLoss(guidance=Guidance(omega=1.0, kappa=0.5), jvp=jvp)(net, x, y, draw, y_null=4)
        assert calls == [(guided + guided_jumps, 0, False), *passes]


class Dropping(nn.Module):
    """A network with dropout: two passes differ, so v_c may not be taken from the gradient forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.dropout = tiny_sit(), nn.Dropout(0.5)

    def forward(self, z, *, t, r, y):
        return self.net(self.dropout(z), t=t, r=r, y=y)


def test_guidance_is_computed_apart_and_without_dropout_where_dropout_is_active():
    net = Dropping().train()
    x, y, draw = batch()
    draw.r = draw.t
    torch.manual_seed(0)
    terms = MeanFlowLoss(guidance=Guidance(omega=1.0, kappa=0.5))(net, x, y, draw, y_null=4)
    assert net.dropout.training
    net.eval()
    _, _, _, v_g = naive_loss(MeanFlowLoss(guidance=Guidance(omega=1.0, kappa=0.5)), net.net, x, y, draw)
    assert torch.allclose(terms.v_g, v_g, rtol=1e-10)


def test_gradient_does_not_flow_through_target_or_weight():
    net = tiny_sit()
    x, y, draw = batch()
    terms = MeanFlowLoss()(net, x, y, draw, y_null=4)
    assert not any(v.requires_grad for v in (terms.u_tgt, terms.v_g, terms.raw_error, terms.dudt_norm, terms.u))


def test_a_network_without_tangents_is_differentiated_by_torch_or_refused():
    net = Dropping().eval()  # no own_tangents
    x, y, draw = batch()
    for terms in (MeanFlowLoss()(net, x, y, draw, y_null=4), MeanFlowLoss(jvp="torch")(net, x, y, draw, y_null=4)):
        assert torch.allclose(terms.raw_error, MeanFlowLoss()(net.net, x, y, draw, y_null=4).raw_error, rtol=1e-10)
    with pytest.raises(UserError, match=r"model.loss.init_args.jvp = network for Dropping.*Set it to torch"):
        MeanFlowLoss(jvp="network")(net, x, y, draw, y_null=4)


def test_guidance_needs_labels():
    net = tiny_sit(num_classes=0)
    x, _, draw = batch()
    with pytest.raises(UserError, match="unconditional network"):
        MeanFlowLoss(guidance=Guidance(omega=2.0))(net, x, None, draw)


@pytest.mark.parametrize(("t", "r"), [(0.2, 0.5), (1.2, 0.5), (0.5, -0.1), (float("nan"), 0.1)])
def test_times_are_checked(t, r):
    net = tiny_sit()
    x, y, draw = batch()
    draw.t[3], draw.r[3] = t, r
    with pytest.raises(UserError, match="row 3"):
        MeanFlowLoss()(net, x, y, draw, y_null=4)


@pytest.mark.parametrize(("n", "share", "expected"), [(256, 0.75, 192), (10, 0.7, 7), (100, 0.29, 29), (7, 0.5, 3), (5, 1, 5)])
def test_fm_count_is_exact(n, share, expected):
    assert fm_count(n, share) == expected
    x = torch.zeros(n, 1, 2, 2)
    draw = MeanFlowLoss(fm_fraction=share).draw_training(x, torch.arange(n), seed=1, step=2, global_batch_size=n)
    assert (draw.r == draw.t)[:expected].all()
    assert (draw.r < draw.t)[expected:].all()


def test_draws_do_not_depend_on_how_rows_are_dealt():
    loss = MeanFlowLoss(times=LogitNormal(), label_drop=DropFirstRows(0.4))
    x = torch.zeros(12, *SHAPE)
    whole = loss.draw_training(x, torch.arange(12), seed=5, step=9, global_batch_size=12)
    for deals in (2, 3, 4):
        for deal in range(deals):
            rows = torch.arange(deal, 12, deals)
            part = loss.draw_training(x[rows], rows, seed=5, step=9, global_batch_size=12)
            for name in ("e", "t", "r", "dropped"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[rows])


def test_label_drop_rules():
    uniform = torch.tensor([0.5, 0.05, 0.9, 0.01, 0.3])
    assert DropFirstRows(0.1)(uniform).tolist() == [True, True, False, False, False]
    assert DropAnyRow(0.1)(uniform).tolist() == [False, True, False, True, False]
    assert not DropAnyRow(0.0)(uniform).any()
    many = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert abs(DropAnyRow(0.1)(many).double().mean() - 0.1) < 0.005
    with pytest.raises(UserError, match="probability"):
        DropFirstRows(1.0)


def test_official_drop_reaches_jump_rows_only_where_it_must():
    loss = MeanFlowLoss(fm_fraction=0.125, label_drop=DropFirstRows(0.6))
    draw = loss.draw_training(torch.zeros(8, *SHAPE), torch.arange(8), seed=0, step=0, global_batch_size=8)
    count = int(draw.dropped.sum())
    assert count > 1  # more than the single r = t row
    assert draw.dropped[:count].all()
    assert draw.r[1] < draw.t[1]


def test_guidance_interval_is_closed_and_compared_in_float32():
    guidance = Guidance(omega=2.0, interval=(0.1, 0.8))
    t = torch.tensor([0.1, 0.8, 0.45], dtype=torch.float32)
    assert guidance.acts_at(t).all()
    assert guidance.acts_at(t.double()).all()
    assert not guidance.acts_at(torch.nextafter(t, torch.tensor([0.0, 1.0, 2.0])))[:2].any()
    assert Guidance(omega=0.2, kappa=0.92).effective_scale == pytest.approx(2.5)


@pytest.mark.parametrize("sampler", [LogitNormal(), Uniform(), TwoLogitNormals()], ids=str)
def test_time_samplers_give_sorted_times(sampler):
    u = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, r = sampler(u)
    assert t.dtype == r.dtype == torch.float32
    assert ((r >= 0) & (r <= t) & (t <= 1)).all()


def test_validation_draws_are_fixed_and_keep_the_share():
    loss = MeanFlowLoss(fm_fraction=0.75)
    x = torch.zeros(16, *SHAPE)
    whole = loss.draw_validation(x, torch.arange(16), seed=3)
    assert int((whole.r == whole.t).sum()) == 12
    part = loss.draw_validation(x[:3], torch.tensor([4, 9, 1]), seed=3)
    assert torch.equal(part.t, whole.t[[4, 9, 1]])
    assert torch.equal(part.e, whole.e[[4, 9, 1]])
    assert not whole.dropped.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Guidance(omega=0),
        lambda: Guidance(kappa=1.0),
        lambda: Guidance(interval=(0.8, 0.2)),
        lambda: AdaptiveWeight(norm_eps=0),
        lambda: AdaptiveWeight(norm_p=-1),
        lambda: LogitNormal(P_std=0),
        lambda: MeanFlowLoss(fm_fraction=1.5),
    ],
)
def test_settings_are_checked(make):
    with pytest.raises(UserError, match=r"^Got .*, expected "):
        make()
