"""Compiled passes, optimizer and average equal the plain ones, in whole graphs, in few sizes."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from mf_lightning.flow import DropAnyRow, Guidance, MeanFlowLoss, Passes
from mf_lightning.flow.passes import PLAIN, check_compiler, compiled_generator
from mf_lightning.optim import average, compile_step, compiled_average, plain_states
from mf_lightning.types import UserError
from tests.nets import SHAPE, tiny_sit
from tests.test_loss import gradients

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("jvp", ["network", "torch"])
def test_compiled_loss_equals_the_plain_one(jvp):
    """fullgraph=True: a graph break would raise."""
    net = tiny_sit(depth=1)
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(32) % 4
    loss = MeanFlowLoss(guidance=Guidance(kappa=0.5), label_drop=DropAnyRow(0.2), jvp=jvp)
    passes, sizes = Passes.compiled(CPU), set()
    for step in range(6):
        draw = loss.draw_training(x, torch.arange(32), seed=0, step=step, global_batch_size=32)
        plain = loss(net, x, y, draw, y_null=4, passes=PLAIN)
        expected = gradients(net, plain.loss)
        terms = loss(net, x, y, draw, y_null=4, passes=passes)
        for name in ("u", "u_tgt", "dudt", "v_g", "raw_error"):
            assert torch.allclose(getattr(terms, name), getattr(plain, name), rtol=1e-10, atol=1e-12), name
        found = gradients(net, terms.loss)
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name
        guided = ~draw.dropped
        sizes.add(passes.padded(int(guided.sum() + (guided & draw.jumps).sum()), 32, parts=8))
    assert counters["stats"]["unique_graphs"] == len(sizes) + (1 if jvp == "network" else 2)


@pytest.mark.slow
def test_activation_checkpointing_compiles_and_gives_the_same():
    net = tiny_sit(depth=1, activation_checkpointing=True)
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = MeanFlowLoss(fm_fraction=0.5)
    draw = loss.draw_training(x, torch.arange(8), seed=0, step=0, global_batch_size=8)
    results = []
    for passes in (PLAIN, Passes.compiled(CPU)):
        terms = loss(net, x, torch.arange(8) % 4, draw, y_null=4, passes=passes)
        results.append([terms.dudt, *gradients(net, terms.loss).values()])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def weights(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, 3, generator=generator, dtype=torch.float64)) for n in (2, 5)]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("default", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_compiled_optimizer_and_average_equal_the_plain_ones(make, default, bound):
    """Under a schedule, over a checkpoint, in one graph each; Adam's step count, a tensor, has torch's default dtype."""
    torch.set_default_dtype(default)
    results = []
    for compiled in (False, True):
        parameters = weights(0)
        optimizer = make(parameters, lr=1e-2)
        means, move = [p.detach().clone() for p in parameters], average
        if compiled:
            compile_step(optimizer)
            move = compiled_average()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(6):
            if step == 3:
                saved = {"optimizer_states": [copy.deepcopy(optimizer.state_dict())], "lr_schedulers": [schedule.state_dict()]}
                plain_states(saved, [optimizer])
                (state,), (rates,) = saved["optimizer_states"], saved["lr_schedulers"]
                assert all(isinstance(group["lr"], float) for group in state["param_groups"])
                assert all(isinstance(rate, float) for rate in rates["_last_lr"])
                assert not any(group["capturable"] for group in state["param_groups"])
                optimizer.load_state_dict(state)

            def closure(parameters=parameters, step=step):
                for parameter, gradient in zip(parameters, weights(step + 1), strict=True):
                    parameter.grad = gradient.detach().clone()
                return torch.ones(())

            assert optimizer.step(closure) == 1
            move(means, [p.detach() for p in parameters], 1 / (step + 2))
            schedule.step()
        results.append([*(p.detach() for p in parameters), *means])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=bound)
    assert counters["stats"]["unique_graphs"] <= 3  # the optimizer's state is new once, the average's


def test_a_fused_optimizer_stays_and_foreach_is_refused():
    fused = torch.optim.Adam(weights(0), lr=1e-2, fused=True)
    compile_step(fused)
    assert "step" not in vars(fused)
    with pytest.raises(UserError, match="foreach = true for the optimizer, expected foreach left out"):
        compile_step(torch.optim.Adam(weights(0), lr=1e-2, foreach=True))


def test_compiled_generator_follows_exchanged_weights():
    """As EMA does: the same graph, other weights."""
    net, other = tiny_sit(depth=1), tiny_sit(depth=1, seed=5)
    z, t = torch.randn(4, *SHAPE, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    generator, how = compiled_generator(net), {"t": t, "r": 0 * t, "y": torch.arange(4)}
    with torch.no_grad():
        assert torch.allclose(generator(z, **how), net(z, **how), rtol=1e-10)
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            mine.data = theirs.data
        assert torch.allclose(generator(z, **how), other(z, **how), rtol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1


def test_no_compiler_is_a_clear_error(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"model.compile = true without a C\+\+ compiler .*no-such-compiler.*expected"):
        check_compiler(CPU)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(UserError, match=r"model\.compile = true on cuda without a working triton"):
        check_compiler(torch.device("cuda"))
