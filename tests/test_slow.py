"""Minutes, not seconds: the quickstart to its promised figures, two processes, a compiled run, a built wheel."""

import csv
import sys

import pytest
import torch

from tests.runs import RECIPES, ROOT, command_line, lines, python

pytestmark = pytest.mark.slow
SMOKE = ("--config", RECIPES / "smoke.yaml")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    assert python("-m", "mf_lightning", "prepare-digits", folder / "digits").returncode == 0
    result = command_line(
        "fit", "--config", RECIPES / "quickstart.yaml", f"--data.init_args.path={folder / 'digits'}",
        f"--trainer.default_root_dir={folder / 'run'}", env={"OMP_NUM_THREADS": "2"}, timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "run", result.stdout


def test_quickstart_reaches_its_figures(quickstart):
    root, printed = quickstart
    rows = lines(root / "sample_eval.jsonl")
    one, two = ([row for row in rows if row["nfe"] == nfe] for nfe in (1, 2))
    last_step = one[-1]["step"]
    assert {row["protocol"]["num_samples"] for row in rows} == {2000}
    assert {row["ema"] for row in rows} == {0.995}
    assert one[-1]["class_accuracy"] >= 0.95
    assert two[-1]["class_accuracy"] >= 0.97
    assert one[0]["step"] >= 0.2 * last_step
    assert one[-1]["fid"] <= one[0]["fid"] / 5
    own = float(printed.split("own reconstructions:")[1].split()[0])
    assert one[-1]["fid"] <= 3 * own
    assert 0 < one[-1]["precision"] <= 1
    assert 0 < one[-1]["recall"] <= 1


def test_two_processes_train_and_score_as_one(tmp_path):
    """The same global batch and the same evaluation images: rows are dealt in turn, gradients averaged."""
    results = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        strategy = ["--trainer.strategy=ddp"] if devices > 1 else []
        result = command_line(
            "fit", *SMOKE, f"--trainer.default_root_dir={root}", f"--trainer.devices={devices}", *strategy,
            "--trainer.max_steps=6", "--trainer.val_check_interval=6", "--trainer.log_every_n_steps=1",
            "--sample_eval.num_samples=51", "--sample_eval.labels=uniform", "--trainer.precision=64-true",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
        results.append((checkpoint["state_dict"], checkpoint["ema"]["weights"]["0.99"], lines(root / "sample_eval.jsonl")))
    (raw1, ema1, rows1), (raw2, ema2, rows2) = results
    for name, value in raw1.items():
        assert torch.allclose(value, raw2[name], rtol=1e-9, atol=1e-12), name
    for name, value in ema1.items():
        assert torch.allclose(value, ema2[name], rtol=1e-9, atol=1e-12), name
    assert len(rows1) == len(rows2) == 2  # written once, by the first process
    for one, other in zip(rows1, rows2, strict=True):
        for key in ("fid", "class_accuracy", "precision", "recall"):
            assert one[key] == pytest.approx(other[key], rel=1e-6), key


def test_the_evaluation_images_are_the_same_set_for_1_2_and_3_processes(tmp_path):
    """Pictures written one by one, and the figures of all of them; 20 images are dealt unevenly to 3."""
    made = command_line("fit", *SMOKE, f"--trainer.default_root_dir={tmp_path / 'fit'}", "--trainer.max_steps=3")
    assert made.returncode == 0, made.stderr[-3000:]
    last, seen = tmp_path / "fit" / "checkpoints" / "last.ckpt", []
    for devices in (1, 2, 3):
        root, strategy = tmp_path / str(devices), ["--trainer.strategy=ddp"] if devices > 1 else []
        common = [
            *SMOKE,
            f"--ckpt_path={last}",
            f"--trainer.devices={devices}",
            *strategy,
            f"--trainer.default_root_dir={root}",
        ]
        common += ["--trainer.precision=64-true", "--sample_eval.batch_size=4"]
        for command, more in (
            ("test", ["--sample_eval.num_samples=50"]), ("predict", ["--sample_writer.num_samples=20"]),
        ):  # fmt: skip
            result = command_line(command, *common, *more, env={"OMP_NUM_THREADS": "1"})
            assert result.returncode == 0, result.stderr[-3000:]
        pictures = {path.name: path.read_bytes() for path in sorted(root.rglob("*.png")) if "grids" not in path.parts}
        seen.append((pictures, lines(root / "sample_eval.jsonl")))
    for pictures, rows in seen:
        assert len(pictures) == 20
        assert pictures == seen[0][0]
        assert len(rows) == 2
        for row, expected in zip(rows, seen[0][1], strict=True):
            assert row["protocol"] == expected["protocol"]
            for key in ("fid", "class_accuracy", "precision", "recall"):
                assert row[key] == pytest.approx(expected[key], rel=1e-6), key


def test_a_compiled_run_is_the_plain_run_and_goes_on_plain(tmp_path):
    """One switch: passes, optimizer, EMA and sampling compiled; the checkpoint does not know."""
    short = ["--trainer.log_every_n_steps=1", "--trainer.val_check_interval=8", "--sample_eval.num_samples=40"]
    curves, figures = {}, {}
    for name, options in {
        "plain": ["--trainer.max_steps=8"],
        "compiled": ["--trainer.max_steps=8", "--model.compile=true"],
        "compiled bf16": ["--trainer.max_steps=8", "--model.compile=true", "--trainer.precision=bf16-mixed"],
    }.items():
        root = tmp_path / name
        result = command_line("fit", *SMOKE, f"--trainer.default_root_dir={root}", *short, *options, timeout=600)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "Self-check passed" in result.stderr
        assert ("compiled du/dt" in result.stderr) == ("compiled" in name)
        with (root / "metrics.csv").open() as file:
            curves[name] = [float(row["train/raw_error"]) for row in csv.DictReader(file) if row["train/raw_error"]]
        figures[name] = lines(root / "sample_eval.jsonl")[0]
    assert len(curves["plain"]) == 8
    assert curves["compiled"] == pytest.approx(curves["plain"], rel=1e-5)
    assert curves["compiled bf16"] == pytest.approx(curves["plain"], rel=0.02)
    assert curves["compiled bf16"] != curves["plain"]
    assert figures["compiled"]["nfe"] == 1  # counted passes
    resumed = command_line(
        "fit",
        *SMOKE,
        f"--trainer.default_root_dir={tmp_path / 'compiled'}",
        *short,
        "--trainer.max_steps=10",
        "--ckpt_path=last",
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    state = torch.load(tmp_path / "compiled" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 10
    assert not any("_orig_mod" in name for name in state["state_dict"])


def test_two_compiled_processes_are_one_plain_one(tmp_path):
    results = []
    for devices, options in ((1, []), (2, ["--trainer.strategy=ddp", "--model.compile=true"])):
        root = tmp_path / str(devices)
        result = command_line(
            "fit", *SMOKE, f"--trainer.default_root_dir={root}", f"--trainer.devices={devices}", *options,
            "--trainer.max_steps=3", "--trainer.limit_val_batches=0", "--sample_eval.num_samples=0",
            "--trainer.precision=64-true", timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
        results.append({**checkpoint["state_dict"], **{f"ema {k}": v for k, v in checkpoint["ema"]["weights"]["0.99"].items()}})
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-5, atol=1e-8), name  # Adam counts its steps in float32


def test_a_built_wheel_carries_configs_and_weights(tmp_path):
    built = python("-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT, timeout=600)
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    installed = python("-m", "pip", "install", "--no-deps", "--target", site, wheel)
    assert installed.returncode == 0, installed.stderr[-2000:]
    code = (
        "import sys; from mf_lightning.cli import configs_dir, main; folder = configs_dir(); print(folder);"
        "main(['fit', '--config', str(folder / 'experiment' / 'smoke.yaml'), '--trainer.default_root_dir=run', "
        "'--trainer.max_steps=2', '--trainer.val_check_interval=2', '--sample_eval.num_samples=20'])"
    )
    result = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert result.returncode == 0, result.stderr[-2000:]
    assert str(site / "mf_lightning" / "configs") in result.stdout
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert sys.version_info >= (3, 10)
