"""The fused kernel under the tangents: run by triton's interpreter where there is no GPU, and refused where it cannot run."""

import sys

import pytest
import torch

from mf_lightning.cli import load
from mf_lightning.nets import SiT, kernels
from mf_lightning.types import LatentSpec, UserError
from tests.runs import RECIPES, python

INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
import jvp_flash_attention.jvp_attention as package
package.supports_tma = lambda: True  # the kernel for newer GPUs; the other one needs an older triton
from mf_lightning.flow import MeanFlowLoss
from mf_lightning.nets import SiT, kernels
from mf_lightning.types import LatentSpec
from tests.nets import randomise

for size in (72, 64, 16):  # XL's head, B's and L's head, a small one
    print(size, kernels.check_kernel(torch.device("cpu"), tokens=32, num_heads=2, head_size=size, dtype=torch.float32))
spec, results = LatentSpec((3, 16, 32), 4), []
for attention in ("math", "flash"):
    net = SiT(spec, patch_size=4, depth=1, hidden_size=144, num_heads=2, jvp_attention=attention)
    randomise(net)
    x = torch.randn(4, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    loss = MeanFlowLoss(fm_fraction=0.5)
    draw = loss.draw_training(x, torch.arange(4), seed=0, step=0, global_batch_size=4)
    results.append(loss(net, x, torch.arange(4), draw, y_null=4).dudt)
print("net", float((results[0] - results[1]).norm() / results[0].norm()))
"""


def test_the_kernel_gives_the_tangents_of_math_attention():
    pytest.importorskip("jvp_flash_attention", reason="the extra `kernels` is not installed")
    result = python("-c", INTERPRETED)
    assert result.returncode == 0, result.stderr[-2000:]
    errors = {line.split()[0]: float(line.split()[1]) for line in result.stdout.splitlines()}
    assert set(errors) == {"72", "64", "16", "net"}
    assert max(errors.values()) < 1e-5


def build(**kwargs) -> SiT:
    settings = {"patch_size": 4, "depth": 1, "hidden_size": 144, "num_heads": 2, **kwargs}
    return SiT(LatentSpec((3, 16, 32), 4), jvp_attention="flash", **settings)


def test_shapes_are_checked_at_the_door():
    with pytest.raises(UserError, match=r"jvp_attention = flash with heads of size 288.*at most 256"):
        build(hidden_size=288, num_heads=1)
    with pytest.raises(UserError, match=r"jvp_attention = flash with 8 tokens, expected a multiple of 32"):
        build(patch_size=8)


def test_a_missing_package_and_a_cpu_are_refused(monkeypatch):
    pytest.importorskip("jvp_flash_attention", reason="the extra `kernels` is not installed")
    with pytest.raises(UserError, match=r"jvp_attention = flash on cpu, expected an Nvidia or AMD GPU.*Use math"):
        build().check_device(torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match=r"jvp_attention = flash in torch.float64"):
        build().check_device(torch.device("cpu"), torch.float64)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", None)
    with pytest.raises(UserError, match=r"without the package jvp-flash-attention.*pip install 'mf_lightning\[kernels\]'"):
        build()


def test_a_kernel_that_differs_is_refused(monkeypatch):
    wrong = lambda q, k, v, scale: 1.05 * kernels.attention_tangent(q, k, v, scale)  # noqa: E731
    monkeypatch.setattr(kernels, "flash_attention_tangent", wrong)
    with pytest.raises(UserError, match=r"differ from math attention's by 0.05.*wrong tangents train silently"):
        kernels.check_kernel(torch.device("cpu"), tokens=32, num_heads=2, head_size=32, dtype=torch.float32)


def test_a_run_refuses_it_before_the_first_step(tmp_path):
    pytest.importorskip("jvp_flash_attention", reason="the extra `kernels` is not installed")
    smoke = ["--config", str(RECIPES / "smoke.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    flash = ["--model.net.init_args.jvp_attention=flash", "--model.net.init_args.patch_size=4"]
    cli = load([*smoke, *flash])
    with pytest.raises(UserError, match=r"model.net.init_args.jvp_attention = flash on cpu"):
        cli.trainer.fit(cli.model, cli.datamodule)
    cli = load([*smoke, *flash, "--model.loss.init_args.jvp=torch"])
    with pytest.raises(UserError, match=r"init_args.jvp = torch with .*jvp_attention = flash"):
        cli.trainer.fit(cli.model, cli.datamodule)
