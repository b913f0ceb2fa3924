"""Power-function averages: profiles against their closed forms, averages against sums, other widths made after training."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.integrate import quad
from torch import nn

from mf_lightning.__main__ import main as command
from mf_lightning.callbacks import PowerEMA
from mf_lightning.checkpoints import read_checkpoint, snapshots
from mf_lightning.checkpoints.snapshots import Header, checksum, combine, drop_later, list_snapshots, write_snapshot
from mf_lightning.checkpoints.weights import load_initial
from mf_lightning.cli import load
from mf_lightning.metrics.protocol import protocol_id
from mf_lightning.profiles import WIDEST, exponent, fit_profile, inner_products, newest_share, step_weights, width
from mf_lightning.types import UserError
from tests.runs import RECIPES, ROOT, command_line

STEPS, EVERY = 240, 10


def profile(tau: float, t: float, gamma: float) -> float:
    return (gamma + 1) * (tau / t) ** gamma / t if 0 < tau <= t else 0.0


# --- profiles


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28, WIDEST])
def test_a_profile_has_integral_1_and_the_width_it_is_named_by(sigma_rel):
    gamma, t = exponent(sigma_rel), 7.0
    mass, mean, square = (quad(lambda tau, k=k: tau**k * profile(tau, t, gamma), 0, t, epsabs=1e-12)[0] for k in range(3))
    assert mass == pytest.approx(1, abs=1e-9)
    assert math.sqrt(square - mean**2) / t == pytest.approx(sigma_rel, rel=1e-7)
    assert width(gamma) == pytest.approx(sigma_rel, rel=1e-12)


def test_known_exponents():
    """The paper's two, and the plain mean."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent(WIDEST) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("ends", [(3.0, 5.0), (5.0, 3.0), (4.0, 4.0)])
def test_inner_products_are_integrals(ends):
    t_a, t_b = ends
    for a in (0.05, 0.1, WIDEST):
        for b in (0.05, 0.2):
            g_a, g_b = exponent(a), exponent(b)
            by_hand = quad(lambda x, g=(g_a, g_b): profile(x, t_a, g[0]) * profile(x, t_b, g[1]), 0, min(ends), epsabs=1e-13)[0]
            assert float(inner_products(t_a, g_a, t_b, g_b)) == pytest.approx(by_hand, rel=1e-9)


def test_inner_products_of_long_trainings_are_finite():
    """400,000 steps to the power of 100."""
    value = float(inner_products(np.float64(4e5), exponent(0.01), np.float64(2.0), exponent(0.01)))
    assert value == pytest.approx(0, abs=1e-300)
    assert float(inner_products(np.float64(4e5), 98.0, np.float64(4e5), 98.0)) == pytest.approx(99**2 / 197 / 4e5)


# --- averages


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, WIDEST])
def test_the_recursion_is_the_weighted_sum(sigma_rel):
    gamma, values = exponent(sigma_rel), torch.randn(300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = torch.full((5,), 1e9, dtype=torch.float64)  # step 1 leaves nothing of it
    for step, value in enumerate(values, start=1):
        average.lerp_(value, newest_share(step, gamma))
    weights = torch.from_numpy(step_weights(len(values), gamma))
    assert weights.sum() == pytest.approx(1, abs=1e-13)
    assert (average - (weights[:, None] * values).sum(0)).abs().max() < 1e-12


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2, dtype=torch.float64)
        self.net.bias.requires_grad_(False)
        self.net.register_buffer("fixed", torch.arange(4))
        self.net.config = {"in": 3}
        self.loss = SimpleNamespace(fm_fraction=0.75)
        self.compiled = False

    def before_saving(self) -> None:
        pass


def trained(
    folder: Path, steps: int = STEPS, every: int = EVERY, seed: int = 1, compiled: bool = False, **settings
) -> tuple[PowerEMA, torch.Tensor]:
    """Return averages of weights on a random walk around 10, with their snapshots in a folder, and the walk."""
    walk = 10 + torch.randn(steps, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).cumsum(0) / 10
    module, phema = Module(), PowerEMA(snapshot_every=every, folder=str(folder), **settings)
    module.compiled = compiled
    info = SimpleNamespace(describe=dict)
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, fast_dev_run=False, training=True)
    trainer.strategy = SimpleNamespace(barrier=lambda: None)
    trainer.datamodule = SimpleNamespace(info=info)
    phema.on_fit_start(trainer, module)
    phema.on_train_start(trainer, module)
    for value in walk:
        for _ in range(2):  # accumulated batches
            phema.on_train_batch_end(trainer, module, None, None, 0)
        with torch.no_grad():
            module.net.weight.copy_(value)
        trainer.global_step += 1
        phema.on_train_batch_end(trainer, module, None, None, 0)
    phema.on_train_end(trainer, module)
    return phema, walk


def true_average(walk: torch.Tensor, step: int, sigma_rel: float) -> torch.Tensor:
    weights = torch.from_numpy(step_weights(step, exponent(sigma_rel)))
    return (weights[:, None, None] * walk[:step]).sum(0)


@pytest.mark.parametrize("settings", [{}, {"compiled": True}, {"on_cpu": True}], ids=str)
def test_the_callback_keeps_the_closed_form(tmp_path, settings):
    phema, walk = trained(tmp_path, steps=25, every=10, **settings)
    for sigma_rel in (0.05, 0.1):
        assert (phema.weights[sigma_rel]["weight"] - true_average(walk, 25, sigma_rel)).abs().max() < 1e-12
        assert list(phema.weights[sigma_rel]) == ["weight"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"step{step:08d}_sigma{s}.safetensors" for step in (10, 20, 25) for s in ("0.050", "0.100")]


def test_a_third_width_is_made_of_two(tmp_path):
    """The error of weights, over how far they moved, is far below the profile's; float16 adds its rounding."""
    _, walk = trained(tmp_path / "32", dtype="float32")
    trained(tmp_path / "16", dtype="float16")
    moved = (walk - walk.mean(0)).abs().max()
    for sigma_rel, bound in ((0.03, 2.5e-2), (0.07, 2.5e-3), (0.15, 6e-3), (0.2, 1.5e-2)):
        true = true_average(walk, STEPS, sigma_rel)
        found = list_snapshots(tmp_path / "32")
        fit = fit_profile([(s.header.step, s.header.sigma_rel) for s in found], STEPS, sigma_rel)
        assert fit.error < bound
        assert fit.factors.sum() == pytest.approx(1, abs=1e-9)
        made = combine(found, map(float, fit.factors))
        assert (made["weight"] - true).abs().max() / moved < bound / 10
        assert made["weight"].dtype == torch.float32
        assert torch.equal(made["fixed"], torch.arange(4))
        rounded = combine(list_snapshots(tmp_path / "16"), map(float, fit.factors))["weight"]
        assert (rounded - true).abs().max() < bound / 10 * moved + np.abs(fit.factors).sum() * 16 * 2**-11


def test_between_two_snapshots_the_error_is_told(tmp_path):
    stored = [(step, s) for step in range(EVERY, STEPS, EVERY) for s in (0.05, 0.1)]
    assert fit_profile(stored, 200, 0.07).error < 0.003 < 0.05 < fit_profile(stored[:40], 205, 0.07).error


@pytest.mark.parametrize("step", [10, 130, 240])
def test_what_is_stored_is_given_back(tmp_path, step):
    _, walk = trained(tmp_path, dtype="float32")
    found = list_snapshots(tmp_path)
    stored = [(s.header.step, s.header.sigma_rel) for s in found]
    factors = fit_profile(stored, step, 0.1).factors
    assert np.count_nonzero(factors) == 1  # the others are not even read
    made = combine(found, map(float, factors))["weight"]
    assert torch.equal(made, true_average(walk, step, 0.1).float())
    others = [each for each in stored if each != (step, 0.1)]  # the solver itself, at a profile it holds
    assert fit_profile([*others, (step, 0.1 + 1e-12)], step, 0.1).error < 1e-6


def test_the_error_bounds_that_of_the_steps(tmp_path):
    """The average of steps is the profile's integral over each: its L2 error is at most the profile's."""
    stored = [(step, s) for step in range(EVERY, STEPS + 1, EVERY) for s in (0.05, 0.1)]
    for sigma_rel in (0.03, 0.07, 0.25):
        fit = fit_profile(stored, STEPS, sigma_rel)
        made = np.zeros(STEPS)
        for factor, (step, s) in zip(fit.factors, stored, strict=True):
            made[:step] += factor * step_weights(step, exponent(s))
        gamma = exponent(sigma_rel)
        largest = fit.error * math.sqrt(inner_products(STEPS, gamma, STEPS, gamma))
        assert np.linalg.norm(made - step_weights(STEPS, gamma)) <= largest * (1 + 1e-6) + 1e-9


# --- files


def test_settings_are_checked():
    for bad in ({"sigma_rels": [0.3]}, {"sigma_rels": [0.0]}, {"sigma_rels": []}, {"sigma_rels": [0.05, 0.05]}):
        with pytest.raises(UserError, match=r"phema\.sigma_rels"):
            PowerEMA(snapshot_every=1, **bad)
    with pytest.raises(UserError, match="three decimals"):
        PowerEMA(sigma_rels=[0.0625])
    with pytest.raises(UserError, match="snapshot_every = 0"):
        PowerEMA(snapshot_every=0)


def test_widths_of_a_checkpoint_and_of_the_settings_must_agree():
    trainer = SimpleNamespace(training=True)
    for ours, saved in (
        (PowerEMA(), {"run": None, "weights": {"0.05": {}}}),
        (PowerEMA(snapshot_every=5), {"run": None, "weights": {"0.05": {}}}),
    ):
        with pytest.raises(UserError, match=r"power averages of the widths \[0.05\], expected .*started late"):
            ours.on_load_checkpoint(trainer, None, {"phema": saved})
    with pytest.raises(UserError, match=r"widths none, expected \[0.05, 0.1\].*snapshot_every to null"):
        PowerEMA(snapshot_every=5).on_load_checkpoint(trainer, None, {})
    PowerEMA().on_load_checkpoint(SimpleNamespace(training=False), None, {"phema": {"run": None, "weights": {"0.05": {}}}})


def test_too_large_for_float16():
    with pytest.raises(UserError, match=r"up to 1e\+05 for a snapshot, expected at most 65504"):
        PowerEMA()._stored(torch.full((2,), 1e5), keep=True)
    assert PowerEMA(dtype="float32")._stored(torch.full((2,), 1e5), keep=True).dtype == torch.float32


def test_later_snapshots_and_halves_are_dropped_and_nothing_else(tmp_path):
    for name in ("step00000010_sigma0.050", "step00000020_sigma0.050", ".step00000020_sigma0.100"):
        (tmp_path / f"{name}.safetensors{'.tmp' if name[0] == '.' else ''}").touch()
    (tmp_path / "notes.txt").touch()
    assert drop_later(tmp_path, 10) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step00000010_sigma0.050.safetensors"]
    assert drop_later(tmp_path / "absent", 10) == 0


def test_snapshots_of_other_runs_are_never_removed(whole, tmp_path):
    folder = tmp_path / "snapshots"
    shutil.copytree(whole / "snapshots", folder)
    before = bytes_of(tmp_path)
    with pytest.raises(UserError, match="a snapshot of another run"):
        drop_later(folder, 6, "0" * 16)
    assert bytes_of(tmp_path) == before
    (folder / "step00000015_sigma0.050.safetensors").write_bytes(b"cut off")
    assert drop_later(folder, 12, "0" * 16) == 1  # whatever it was
    fit(tmp_path, trainer__max_steps=3)  # anew
    assert {path.name: path.read_bytes() for path in sorted((folder / "earlier-1").iterdir())} == before
    assert {path.name[:12] for path in folder.glob("step*")} == {"step00000003"}


def test_a_full_disk_leaves_no_half(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    tensors = {"a": torch.ones(2)}
    header = Header(1, 0.05, "r", {}, {}, 0.5, (), checksum(tensors))
    monkeypatch.setattr(snapshots, "publish", full)
    with pytest.raises(UserError, match=r"no snapshot written .*No space left"):
        write_snapshot(tmp_path, tensors, header)
    assert list(tmp_path.iterdir()) == []


def refusal(capsys, *args: object) -> str:
    """Return the one message that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        command(["phema", *map(str, args)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message) < 700
    return message


def test_what_cannot_be_made_is_refused(tmp_path, capsys):
    trained(tmp_path / "run" / "snapshots", steps=60, every=20)
    run, out = tmp_path / "run", tmp_path / "out.ckpt"
    assert "no snapshots" in refusal(capsys, tmp_path / "out", "--sigma_rel=0.1")
    for bad in ("0", "-0.1", "0.3", ".nan"):
        assert "in (0, 0.2886]" in refusal(capsys, run, f"--sigma_rel={bad}")
    assert "steps 20 to 60" in refusal(capsys, run, "--sigma_rel=0.1", "--step=61")
    assert "steps 20 to 60" in refusal(capsys, run, "--sigma_rel=0.1", "--step=19")
    assert "--force=true" in refusal(capsys, run, "--sigma_rel=0.01", f"--out={out}")
    assert "ends in .ckpt" in refusal(capsys, run, "--sigma_rel=0.1", "--out=a.pt")
    assert not out.exists()
    command(["phema", str(run), "--sigma_rel=0.01", f"--out={out}", "--force=true"])
    assert "which exists" in refusal(capsys, run, "--sigma_rel=0.1", f"--out={out}")
    command(["phema", str(run), "--sigma_rel=0.1", f"--out={out}", "--overwrite=true"])
    assert read_checkpoint(out)["imported"]["weights"] == "phema 0.1"
    command(["phema", str(run)])
    assert "too large" in capsys.readouterr().out


def test_snapshots_of_two_runs_and_damaged_ones_are_refused(tmp_path, capsys):
    for seed in (1, 2):
        trained(tmp_path / str(seed) / "snapshots", steps=60, every=20, seed=seed)
    one, two = tmp_path / "1" / "snapshots", tmp_path / "2" / "snapshots"
    file = one / "step00000040_sigma0.050.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for damage in (whole[: len(whole) // 2], b"", bytes(flipped), whole[:20] + bytes(len(whole) - 20)):
        file.write_bytes(damage)
        message = refusal(capsys, tmp_path / "1", "--sigma_rel=0.07", "--force=true")
        assert file.name in message
        assert "damaged" in message
    file.write_bytes((one / "step00000020_sigma0.050.safetensors").read_bytes())
    assert "renamed" in refusal(capsys, tmp_path / "1", "--sigma_rel=0.07")
    file.write_bytes((two / file.name).read_bytes())
    assert "several runs" in refusal(capsys, tmp_path / "1", "--sigma_rel=0.07")
    assert not (tmp_path / "1" / "phema").exists()


# --- whole runs

SETTINGS = {
    "data.init_args.train_size": 60,
    "data.init_args.val_size": 12,
    "data.init_args.batch_size": 8,
    "trainer.val_check_interval": 4,
    "trainer.limit_val_batches": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "sample_eval.num_samples": 0,
    "sample_grid.rows": 0,
    "self_check.enabled": "false",
    "phema.snapshot_every": 3,
    "trainer.max_steps": 12,
}


def options(root: Path, **changes) -> list[str]:
    settings = {**SETTINGS, "trainer.default_root_dir": root, **{k.replace("__", "."): v for k, v in changes.items()}}
    return ["--config", str(RECIPES / "smoke.yaml"), *(f"--{key}={value}" for key, value in settings.items())]


def fit(root: Path, resume: Path | None = None, **changes) -> None:
    cli = load(options(root, **changes))
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resume and str(resume))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "snapshots").iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    fit(root)
    return root


def test_a_resumed_run_writes_the_same_bytes(whole, tmp_path):
    """Killed at step 11 after a checkpoint of step 8: step 9 was written, and a later one half."""
    fit(tmp_path, trainer__max_steps=8)
    folder = tmp_path / "snapshots"
    (folder / "step00000008_sigma0.050.safetensors").unlink()  # of the shorter run's end
    (folder / "step00000008_sigma0.100.safetensors").unlink()
    (folder / "step00000009_sigma0.050.safetensors").write_bytes(b"of a run that was killed")
    (folder / ".step00000012_sigma0.050.safetensors.tmp").write_bytes(b"half")
    (folder / "step00000015_sigma0.050.safetensors").write_bytes(b"further than this run goes")
    fit(tmp_path, resume=tmp_path / "checkpoints" / "last.ckpt")
    expected = bytes_of(whole)
    assert len(expected) == 8
    assert bytes_of(tmp_path) == expected


def test_the_made_average_is_scored_and_sampled(whole, tmp_path, capsys):
    command(["phema", str(whole), "--sigma_rel=0.08", "--force=true"])
    made = whole / "phema" / "step00000012_sigma0.08.ckpt"
    assert "relative L2 error of the profile" in capsys.readouterr().out
    command(["sample", str(made), str(tmp_path / "one.png"), "--n=4"])
    assert (tmp_path / "one.png").stat().st_size > 100
    cli = load(options(tmp_path, sample_eval__num_samples=20, sample_eval__emas="[null]"))
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path=str(made), weights_only=True)
    weights = read_checkpoint(made)["state_dict"]
    assert torch.equal(cli.model.net.state_dict()["final_layer.linear.weight"], weights["net.final_layer.linear.weight"])
    row = json.loads((tmp_path / "sample_eval.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 12
    assert row["protocol"]["weights"].startswith("phema 0.08 of snapshots of run ")  # not the run's own weights
    assert row["protocol_id"] != protocol_id({**row["protocol"], "weights": None})
    net = cli.model.net
    with torch.no_grad():
        for value in net.parameters():
            value.zero_()
    load_initial(net, str(made))  # model.init_from
    command(["export", str(made), str(tmp_path / "exported"), "--to=safetensors"])
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[f"net.{name}"]), name
        assert torch.equal(value, exported[name]), name
    command(["phema", str(whole), "--sigma_rel=0.1", "--step=9", f"--out={tmp_path / 'nine.safetensors'}"])
    nine = load_file(tmp_path / "nine.safetensors")
    stored = load_file(whole / "snapshots" / "step00000009_sigma0.100.safetensors")
    for name, value in nine.items():
        assert torch.equal(value, stored[name].to(value.dtype)), name
    with safe_open(tmp_path / "nine.safetensors", "pt") as file:
        assert file.metadata()["weights"] == "phema 0.1"


@pytest.mark.slow
def test_two_processes_write_one_process_snapshots(tmp_path):
    """DDP and FSDP, in float64, with a resumed FSDP run."""
    common = {"trainer.precision": "64-true", "phema.dtype": "float32", "trainer.max_steps": 6, "trainer.val_check_interval": 3}
    ways = {
        "one": [],
        "ddp": ["--trainer.strategy=ddp", "--trainer.devices=2"],
        "fsdp": [f"--trainer={ROOT / 'configs/trainer/fsdp.yaml'}", "--trainer.accelerator=cpu", "--trainer.devices=2"],
    }
    for way, extra in ways.items():
        root = tmp_path / way
        changes = {**common, "trainer.max_steps": 3} if way == "fsdp" else common
        given = [*options(root)[:2], *extra, *options(root, **changes)[2:]]
        result = command_line("fit", *given, env={"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr[-2000:]
        if way == "fsdp":
            given = [*given, "--trainer.max_steps=6", "--ckpt_path=last"]
            result = command_line("fit", *given, env={"OMP_NUM_THREADS": "1"})
            assert result.returncode == 0, result.stderr[-2000:]
    for step in (3, 6):
        for sigma_rel in ("0.050", "0.100"):
            name = f"snapshots/step{step:08d}_sigma{sigma_rel}.safetensors"
            one = load_file(tmp_path / "one" / name)
            for way in ("ddp", "fsdp"):
                other = load_file(tmp_path / way / name)
                assert one.keys() == other.keys()
                for key, value in one.items():
                    assert torch.allclose(value, other[key], rtol=1e-5, atol=1e-8), (way, name, key)
