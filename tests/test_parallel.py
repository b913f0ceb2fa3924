"""One process, DDP and FSDP are one training: the same rows, derivatives, gradients, weights, averages and images."""

from __future__ import annotations

import pytest
import torch

from tests.runs import RECIPES, ROOT, python

DDP = ["--trainer.strategy=ddp", "--trainer.devices=2"]
FSDP = ["--trainer=" + str(ROOT / "configs/trainer/fsdp.yaml"), "--trainer.accelerator=cpu", "--trainer.devices=2"]
WAYS = {
    "one": [],
    "ddp": DDP,
    "fsdp": FSDP,
    "accumulated": ["--trainer.accumulate_grad_batches=2"],
    "ddp accumulated": [*DDP, "--trainer.accumulate_grad_batches=2"],
    "fsdp accumulated": [*FSDP, "--trainer.accumulate_grad_batches=2"],
    "hsdp": [*FSDP, "--trainer.strategy.init_args.replicas=2"],
    "hsdp of four": [*FSDP, "--trainer.devices=4", "--trainer.strategy.init_args.replicas=2"],
    "fsdp checkpointed": [*FSDP, "--model.net.init_args.activation_checkpointing=true"],
    "fsdp compiled": [*FSDP, "--model.compile=true"],
    "torch jvp": ["--model.loss.init_args.jvp=torch"],
    "fsdp torch jvp": [*FSDP, "--model.loss.init_args.jvp=torch"],
}
FLOAT64, FLOAT32 = "64-true", "32-true"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return what runs recorded, each made once."""
    made: dict[tuple, dict] = {}

    def record(way: str, precision: str = FLOAT64, steps: int = 20, *options: str, **environment: str) -> dict:
        key = (way, precision, steps, options, tuple(environment))
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            result = python(
                ROOT / "tests" / "parallel_run.py", folder / "out.pt", f"--config={RECIPES / 'smoke.yaml'}", *WAYS[way],
                f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={steps}", f"--trainer.precision={precision}",
                "--data.init_args.batch_size=24", "--trainer.gradient_clip_val=0.5", "--trainer.enable_progress_bar=false",
                "--trainer.limit_val_batches=0", "--sample_eval.num_samples=0", "--ema.decays=[0.9,0.99]", *options,
                env={"OMP_NUM_THREADS": "1", **environment}, timeout=300,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr[-3000:]
            made[key] = torch.load(folder / "out.pt", weights_only=False)
        return made[key]

    return record


def assert_equal(one: dict, other: dict, bound: float) -> None:
    """Compare two recorded runs: every row of every step, every gradient, weights and averages at the end."""
    for number, step in enumerate(other["steps"]):
        assert step["apart"] <= bound, f"processes hold other gradients at step {number}"
    assert torch.equal(one["row"], other["row"])
    assert torch.equal(one["index"], other["index"])
    for name in ("raw_error", "dudt_norm"):
        assert_close(one[name], other[name], bound, name)
    assert len(one["steps"]) == len(other["steps"])
    for number, (step, others) in enumerate(zip(one["steps"], other["steps"], strict=True)):
        largest = max(float(gradient.abs().max()) for gradient in step["gradients"].values())
        for name, gradient in step["gradients"].items():
            assert (gradient - others["gradients"][name]).abs().max() <= bound * largest, f"gradient of {name}, step {number}"
    for name, value in one["weights"].items():
        assert_close(value, other["weights"][name], bound, name)
    assert set(one["ema"]) == {0.9, 0.99} == set(other["ema"])
    for decay, weights in one["ema"].items():
        for name, value in weights.items():
            assert_close(value, other["ema"][decay][name], bound, f"EMA {decay} of {name}")


def assert_close(one: torch.Tensor, other: torch.Tensor, bound: float, what: str) -> None:
    scale = one.abs().max()
    assert scale > 0, f"{what} is zero and proves nothing"
    assert (one - other).abs().max() <= bound * scale, what


def slow_but(*fast: str) -> list:
    """Return the ways to compare with one process; all but a few are slow tests."""
    ways = [way for way in WAYS if way not in ("one", "torch jvp")]
    return [way if way in fast else pytest.param(way, marks=pytest.mark.slow) for way in ways]


@pytest.mark.parametrize("way", slow_but("ddp", "fsdp"))
def test_every_way_is_one_training_in_float64(recorded, way):
    assert_equal(recorded("torch jvp" if "jvp" in way else "one"), recorded(way), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_and_in_float32(recorded, way):
    """By SGD and from smaller weights: Adam's first steps are signs, which turn the rounding of a gradient near zero into a
    whole step, and raw errors of a million amplify the rest."""
    sgd = '--model.optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}'
    one, other = (recorded(w, FLOAT32, 20, sgd, INITIAL_STD="0.05") for w in ("one", way))
    assert_equal(one, other, 1e-5)


def test_without_averaging_the_comparison_fails(recorded):
    """The silent failure of a JVP beside DDP: losses look right, each process goes its own way."""
    with pytest.raises(AssertionError, match="processes hold other gradients at step 0"):
        assert_equal(recorded("one"), recorded("ddp", WITHOUT_AVERAGING="1"), 1e-9)
