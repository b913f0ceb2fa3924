"""The benchmarks run and print what they promise; their figures are read, never tested."""

import json

import pytest
import torch

from benchmarks import train_step
from tests.nets import randomise
from tests.runs import ROOT, python

TINY = ["--size", "S", "--patch", "8", "--latent", "3", "16", "16", "--batch", "8", "--rounds", "2"]


def test_train_step_prints_ratios_last():
    result = python(ROOT / "benchmarks" / "train_step.py", *TINY, "--optimizer", "--peak-tflops", "1")
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert set(report["ratio"]) == {"none", "kappa0", "kappa0.5", "naive_none", "naive_kappa0.5"}
    assert all(ratio > 0 for ratio in report["ratio"].values())
    rows = report["variants"]["eager"]
    for row in rows.values():
        assert {"seconds", "images_per_second", "ratio", "peak_bytes", "saved_bytes", "mfu"} <= set(row)
    assert rows["fm"]["ratio"] == 1
    assert rows["none"]["saved_bytes"] <= 1.05 * rows["fm"]["saved_bytes"]
    assert "images/s" in result.stdout


def test_xl2_costs_119_gmacs():
    args = train_step.parse(["--size", "XL", "--latent", "4", "32", "32"])
    assert train_step.forward_flops(args) / 2e9 == pytest.approx(119, rel=0.01)  # the paper's table


def test_the_naive_form_is_the_same_loss():
    args = train_step.parse([*TINY])
    bench = train_step.make_bench(args)
    randomise(bench.net.double(), std=0.05)
    bench.x = bench.x.double()
    draw = bench.draws[0]
    draw.e = draw.e.double()
    for guidance in train_step.GUIDANCES.values():
        ours = train_step.meanflow(bench, train_step.PLAIN, guidance, args)(draw)
        theirs = train_step.naive(bench, guidance, compiled=False)(draw)
        gradients = []
        for loss in (ours, theirs):
            bench.net.zero_grad()
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in bench.net.parameters()]))
        assert torch.allclose(ours, theirs, rtol=1e-9)
        assert (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[1].norm()


@pytest.mark.parametrize("checkpointing", [[], ["--activation-checkpointing"]], ids=["plain", "checkpointing"])
def test_a_meanflow_step_keeps_no_more_memory_than_flow_matching(checkpointing):
    """Counted as live memory: what a checkpoint keeps is not seen by saved-tensor hooks."""
    args = train_step.parse(["--latent", "4", "8", "8", "--batch", "16", *checkpointing])
    bench = train_step.make_bench(args)
    losses = {name: train_step.meanflow(bench, train_step.PLAIN, g, args) for name, g in train_step.GUIDANCES.items()}
    plain = train_step.saved_bytes(bench, train_step.flow_matching(bench, train_step.PLAIN))
    for name, loss in losses.items():
        assert train_step.saved_bytes(bench, loss) <= 1.05 * plain, name


def test_evaluate_gives_every_stage_and_the_whole():
    smoke = str(ROOT / "configs" / "experiment" / "smoke.yaml")
    options = [
        "--config",
        smoke,
        "--images",
        "24",
        "--nfe",
        "1",
        "3",
        "--batches",
        "1",
        "--json",
        "--",
        "--sample_eval.batch_size=12",
    ]
    result = python(ROOT / "benchmarks" / "evaluate.py", *options)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    for stage in ("noise", "nfe1", "nfe3", "decode", "extract"):
        assert report[f"{stage}_images_per_s"] > 0
    assert report["validation_s"] > 0
    assert report["metrics"].split()[0] == "fid"


@pytest.mark.parametrize("file", ["train_step.py", "sample.py"])
def test_a_device_that_is_not_there_is_a_clear_error(file):
    result = python(ROOT / "benchmarks" / file, "--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2
    assert "error: Got --device cuda, expected one that is there. Run with --device cpu." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_sample_prints_each_part():
    options = ["--size", "S", "--latent", "4", "8", "8", "--batch", "2", "--rounds", "1", "--no-compile", "--json"]
    result = python(ROOT / "benchmarks" / "sample.py", *options)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert report["generator"]["plain"]["latency_ms"] > 0
    assert report["decoder"]["channels_last"]["equal_share"] >= 0.999
    assert report["extractor"]["inception-v3-compat"]["images_per_second"] > 0


@pytest.mark.parametrize(
    ("more", "kinds"),
    [
        (["--no-compile"], {"eager", "onnx"}),
        pytest.param([], {"eager", "compiled", "onnx"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "compiled"],
)
def test_sample_times_one_latent_side_by_side(more, kinds):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options = ["--single", "--size", "S", "--patch", "8", "--latent", "4", "8", "8", "--rounds", "1", "--json", *more]
    result = python(ROOT / "benchmarks" / "sample.py", *options)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert "one image" not in report
    rows = report["one latent"]
    assert set(rows) == kinds
    assert rows["eager"]["ratio"] == 1
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["latency_ms"] / rows["eager"]["latency_ms"])
