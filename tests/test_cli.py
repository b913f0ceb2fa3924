"""The command line, run as a user runs it: what a run leaves, resume, scoring, sampling, and messages."""

import csv

import pytest
import torch
import torch_fidelity
import yaml
from PIL import Image

from mf_lightning.autoencoders import PixelAutoencoder
from mf_lightning.cli import configs_dir, main
from mf_lightning.data import SevenSegmentDataModule
from mf_lightning.metrics.protocol import NAMES
from mf_lightning.sheet import to_picture
from mf_lightning.types import UserError
from tests.runs import RECIPES, command_line, error_of, lines

SMOKE = ("--config", RECIPES / "smoke.yaml")
KEYS = {
    "step",
    "ema",
    "nfe",
    *NAMES,
    "kid_std",
    "inception_score_std",
    "images_per_s",
    "stage",
    "seconds_per_image",
    "protocol",
    "protocol_id",
}
TENSORBOARD = RECIPES.parent / "trainer" / "tensorboard.yaml"
PROTOCOL = {
    "extractor", "layer", "resize", "reference", "labels", "autoencoder", "rounding", "num_samples", "seed", "precision",
    "ema", "nfe", "kid_subset_size", "dinov2", "sampler", "weights", "extractor_weights",
    "class_layer",
}  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke recipe, run whole, from another working directory."""
    root = tmp_path_factory.mktemp("smoke") / "run"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    result = command_line("fit", *SMOKE, f"--trainer.default_root_dir={root}", cwd=elsewhere)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not list(elsewhere.iterdir())  # everything lies under trainer.default_root_dir
    return root, result


def test_a_run_leaves_its_files(smoke):
    root, result = smoke
    for name in ("config.yaml", "metrics.csv", "sample_eval.jsonl"):
        assert (root / name).is_file()
    assert [p.name for p in root.rglob("last*.ckpt")] == ["last.ckpt"]
    assert sorted(p.name for p in (root / "checkpoints").iterdir()) == [
        "best_nfe1.ckpt", "best_nfe2.ckpt", "last.ckpt", "step00000030.ckpt", "step00000060.ckpt",
    ]  # fmt: skip
    assert (root / "checkpoints" / "last.ckpt").resolve().name == "step00000060.ckpt"
    names = sorted(p.name for p in (root / "grids").iterdir())
    assert names == [f"step{step:08d}{of}.png" for step in (30, 60) for of in ("", "_nfe1", "_nfe2", "_nfe4")]
    assert Image.open(root / "grids" / names[1]).size == (10 * 34 + 2, 4 * 34 + 2)
    assert not list(root.rglob("*.tmp"))
    for what in ("Step 60, 100 images", "grids:", "last.ckpt", "best fid/nfe2", "metrics.csv"):
        assert what in result.stdout


def test_sample_eval_lines(smoke):
    rows = lines(smoke[0] / "sample_eval.jsonl")
    assert [(row["step"], row["nfe"], row["ema"]) for row in rows] == [
        (30, 1, 0.99),
        (30, 2, 0.99),
        (60, 1, 0.99),
        (60, 2, 0.99),
    ]
    for row in rows:
        assert set(row) == KEYS
        assert set(row["protocol"]) == PROTOCOL
        assert 0 <= row["class_accuracy"] <= 1
        assert row["fid"] > 0
        assert row["images_per_s"] > 0
        assert row["seconds_per_image"] > 0
        assert row["kid"] > 0
        assert row["sfid"] is row["fd_dinov2"] is None


def test_metrics_are_logged(smoke):
    rows = list(csv.DictReader((smoke[0] / "metrics.csv").open()))
    found = {key for row in rows for key, value in row.items() if value}
    for stage in ("train", "val"):
        for name in ("loss", "raw_error", "velocity_error", "dudt_norm"):
            assert f"{stage}/{name}" in found
    assert {"train/grad_norm", "fid/nfe1", "fid/nfe2", "class_accuracy/nfe1", "precision/nfe2"} <= found
    weighted = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert all(0.9 < value < 1 for value in weighted)  # the weighted loss hovers near 1, the raw error tells
    raw = [float(row["train/raw_error"]) for row in rows if row["train/raw_error"]]
    assert raw[-1] < 0.9 * raw[0]


def test_checkpoint_is_plain_and_complete(smoke):
    checkpoint = torch.load(smoke[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 60
    assert checkpoint["format_version"] == 1
    assert checkpoint["net"]["class_path"] == "mf_lightning.nets.sit.SiT"
    assert checkpoint["net"]["init_args"]["depth"] == 2
    raw = {name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()}
    averages = checkpoint["ema"]["weights"]["0.99"]
    assert set(averages) == set(raw) - {"pos_embed"}
    assert checkpoint["ema"]["updates"] == 60
    assert any(not torch.equal(raw[name], value) for name, value in averages.items())


def test_saved_config_runs_again(smoke, tmp_path):
    config = smoke[0] / "config.yaml"
    assert "${" not in config.read_text()
    result = command_line("fit", "--config", config, f"--trainer.default_root_dir={tmp_path}", "--print_config")
    assert result.returncode == 0
    printed = yaml.safe_load(result.stdout)
    assert printed["data"]["class_path"] == "mf_lightning.data.SevenSegmentDataModule"


def test_a_second_fit_names_the_two_ways_on(smoke):
    root, _ = smoke
    before = (root / "sample_eval.jsonl").read_text(), (root / "metrics.csv").read_text()
    message = error_of(command_line("fit", *SMOKE, f"--trainer.default_root_dir={root}"))
    assert "--ckpt_path=last" in message
    assert f"rm -r {root}" in message
    assert before == ((root / "sample_eval.jsonl").read_text(), (root / "metrics.csv").read_text())


def test_test_takes_sampling_steps_from_the_command_line_and_leaves_the_curves_alone(smoke):
    """The checkpoint's settings must not win over the command line."""
    root, _ = smoke
    metrics, evaluations = (root / "metrics.csv").read_text(), lines(root / "sample_eval.jsonl")
    checkpoint = root / "checkpoints" / "last.ckpt"
    for subcommand, nfe in (("test", 4), ("validate", 3)):
        result = command_line(
            subcommand, *SMOKE, f"--trainer.default_root_dir={root}", f"--ckpt_path={checkpoint}",
            f"--sample_eval.nfe=[{nfe}]", "--sample_eval.num_samples=50", "--sample_eval.emas=[null]", "--config", TENSORBOARD,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        row = lines(root / "sample_eval.jsonl")[-1]
        assert (row["nfe"], row["step"], row["ema"], row["protocol"]["num_samples"]) == (nfe, 60, None, 50)
        assert (row["stage"], row["protocol"]["weights"]) == (subcommand, None)
        logged = (root / f"metrics_{subcommand}.csv").read_text().splitlines()
        place = logged[0].split(",").index("step")
        assert {line.split(",")[place] for line in logged[1:]} == {"60"}  # not 0, where training began
        [events] = root.rglob("events.out.tfevents*")
        assert subcommand in events.relative_to(root).parts  # no curve of training
        events.unlink()
    assert (root / "metrics.csv").read_text() == metrics
    assert lines(root / "sample_eval.jsonl")[: len(evaluations)] == evaluations


def test_predict_writes_images_that_depend_on_seed_and_number_only(smoke, tmp_path):
    root, _ = smoke
    found = []
    for batch_size in (12, 5):
        folder = tmp_path / str(batch_size)
        result = command_line(
            "predict", *SMOKE, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={root / 'checkpoints' / 'last.ckpt'}",
            "--sample_writer.num_samples=12", "--sample_writer.num_steps=2", f"--sample_writer.batch_size={batch_size}",
            f"--sample_writer.folder={folder}",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        assert len(list(folder.glob("*.png"))) == 12
        found.append([list(Image.open(folder / f"{i:06d}.png").tobytes()) for i in range(12)])
        labels = list(csv.DictReader((folder / "labels.csv").open()))
        assert [int(row["label"]) for row in labels] == [*range(10), 0, 1]
    worst = max(abs(a - b) for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True))
    assert worst <= 1  # the last bit of a matrix product may depend on the batch size, a rounded pixel then too


def test_the_callbacks_fid_is_torch_fidelitys_on_the_same_pngs(smoke, tmp_path):
    """`predict` writes the very images that were scored; torch-fidelity finds the same figures in their folder."""
    root, _ = smoke
    result = command_line(
        "predict", *SMOKE, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={root / 'checkpoints' / 'last.ckpt'}",
        "--sample_writer.num_samples=100", "--sample_writer.num_steps=1", "--sample_writer.batch_size=250",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    real = tmp_path / "real"
    real.mkdir()
    data = SevenSegmentDataModule(PixelAutoencoder())
    for pixels, index in data.decoded_split("train", device=torch.device("cpu"), batch_size=250):
        for picture, number in zip(pixels, index.tolist(), strict=True):
            to_picture(picture).save(real / f"{number:06d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"), input2=str(real), cuda=False, fid=True, prc=True, verbose=False, cache=False,
        feature_extractor="digits-cnn", save_cpu_ram=True,
    )  # fmt: skip
    row = next(row for row in lines(root / "sample_eval.jsonl") if (row["step"], row["nfe"]) == (60, 1))
    assert row["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert row["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert row["recall"] == pytest.approx(theirs["recall"], rel=1e-6)


def test_resume_is_bitwise(tmp_path):
    """25 steps, in the middle of an epoch, and 5 more equal 30, in weights, averages and logs, each step once."""
    short = ("--sample_eval.num_samples=20", "--sample_grid.rows=0", "--trainer.val_check_interval=10")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for root, steps, extra in ((whole, 30, []), (parts, 25, []), (parts, 30, ["--ckpt_path=last"])):
        settings = [f"--trainer.default_root_dir={root}", f"--trainer.max_steps={steps}", *extra]
        result = command_line("fit", *SMOKE, *short, *settings)
        assert result.returncode == 0, result.stderr[-2000:]
        saved = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == steps  # also where no validation fell on the last step
    one, other = (torch.load(root / "checkpoints" / "last.ckpt", weights_only=True) for root in (whole, parts))
    assert one["global_step"] == other["global_step"] == 30
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for name, value in one["ema"]["weights"]["0.99"].items():
        assert torch.equal(value, other["ema"]["weights"]["0.99"][name]), name
    for root in (whole, parts):
        steps = [(row["step"], row["nfe"]) for row in lines(root / "sample_eval.jsonl")]
        assert steps == [(step, nfe) for step in (10, 20, 30) for nfe in (1, 2)]
    rows = [
        [(r["step"], r["train/raw_error"]) for r in csv.DictReader((root / "metrics.csv").open()) if r["train/raw_error"]]
        for root in (whole, parts)
    ]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == ["9", "19", "29"]


def test_nothing_to_resume_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *map(str, SMOKE), f"--trainer.default_root_dir={tmp_path}", "--ckpt_path=last"])
    assert "expected a run to resume" in capsys.readouterr().err


@pytest.mark.slow
def test_other_counts_of_steps_need_no_other_settings(tmp_path):
    """Only asked-for NFEs are scored and kept as best; evaluation may be off altogether."""
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    ways = {"three": ["--sample_eval.nfe=[3]", "--sample_eval.num_samples=20"], "off": ["--sample_eval.num_samples=0"]}
    for name, extra in ways.items():
        root = tmp_path / name
        assert command_line("fit", *SMOKE, f"--trainer.default_root_dir={root}", *short, *extra).returncode == 0
        assert sorted(p.name for p in (root / "checkpoints").iterdir()) == ["last.ckpt", "step00000002.ckpt"]
    assert lines(tmp_path / "three" / "sample_eval.jsonl")[0]["nfe"] == 3
    assert not (tmp_path / "off" / "sample_eval.jsonl").exists()


def test_unconditional_training(tmp_path):
    result = command_line(
        "fit", *SMOKE, f"--trainer.default_root_dir={tmp_path}", "--model.net.init_args.num_classes=0",
        "--model.loss.init_args.guidance={omega: 1.0, kappa: 0.0}", "--trainer.max_steps=4", "--trainer.val_check_interval=4",
        "--sample_eval.num_samples=20",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    row = lines(tmp_path / "sample_eval.jsonl")[-1]
    assert row["class_accuracy"] is None
    assert row["protocol"]["labels"] == "none"
    names = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("y_embedder" in name for name in names)


def test_wandb_offline(tmp_path):
    """One more config part adds W&B; offline it needs no account; a resumed run is the same W&B run."""
    for steps in (2, 4):
        result = command_line(
            "fit", *SMOKE, "--config", RECIPES.parent / "trainer" / "wandb.yaml", f"--trainer.default_root_dir={tmp_path}",
            f"--trainer.max_steps={steps}", "--trainer.val_check_interval=2", "--sample_eval.num_samples=20",
            "--ckpt_path=auto",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "metrics.csv").is_file()
    written = [file.stem for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert len(written) == 2
    assert {name.removeprefix("run-") for name in written} == {(tmp_path / "wandb_id").read_text()}


# options and messages


def test_help_reads_as_a_manual():
    text = " ".join(command_line("fit", "--help").stdout.split())
    for sentence in (
        "sampling steps to compare; each is one network pass",
        "one average each, in (0, 1); null is [0.9999], the papers' on ImageNet",
        "the MeanFlow loss; ``fm_fraction: 1`` is plain flow matching",
        "of times, noise and label drop: with the optimizer step and the row it decides every draw",
    ):
        assert sentence in text
    loss = " ".join(command_line("fit", "--model.loss.help=mf_lightning.flow.MeanFlowLoss").stdout.split())
    assert "share of rows with r = t (0.75 in the paper)" in loss
    net = " ".join(command_line("fit", "--model.net.help=mf_lightning.nets.SiT").stdout.split())
    assert "normalise queries and keys" in net


def test_a_class_count_of_the_users_is_never_overwritten_silently(tmp_path, capsys):
    """LightningCLI's links would replace it with the data set's; here it is compared (see the messages below)."""
    arguments = ["fit", *map(str, SMOKE), "--model.net.init_args.num_classes=10", "--print_config"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "num_classes: 10" in capsys.readouterr().out


def test_a_missing_base_config_raises(monkeypatch, tmp_path):
    monkeypatch.setattr("mf_lightning.cli.__file__", str(tmp_path / "package" / "cli.py"))
    with pytest.raises(UserError, match=r"Got no base.yaml"):
        configs_dir()


def test_interpolation_happens_after_merging(tmp_path):
    """A later file and the command line change what an earlier file's ${...} says; files may read the environment."""
    part = tmp_path / "part.yaml"
    part.write_text("trainer: {max_steps: 7}\nsample_eval: {reference: '${oc.env:MY_REFERENCE}'}\n")
    result = command_line(
        "fit", "--config", RECIPES / "quickstart.yaml", "--config", part, f"--trainer.default_root_dir={tmp_path}",
        "--print_config", env={"MY_REFERENCE": "somewhere.npz"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "total_steps: 7" in result.stdout
    assert f"folder: {tmp_path}/checkpoints" in result.stdout
    assert "reference: somewhere.npz" in result.stdout


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {seed: 1}", "does not accept option 'modle.seed' Did you mean 'model.seed'?"),
        ("sample_eval: {nfes: [1]}", "does not accept option 'sample_eval.nfes' Did you mean 'sample_eval.nfe'?"),
        ("model: {net: {class_path: mf_lightning.nets.SiT, init_args: {depht: 3}}}", "'depht' is not accepted"),
        ("config: other.yaml", "Got a `config:` key"),
        ("just words", "without settings in it"),
        ("sample_eval: {reference: '${oc.env:NOT_SET_ANYWHERE}'}", "'NOT_SET_ANYWHERE' not found"),
        ("sample_eval: {nfe: [0]}", "Got num_steps = 0"),
        ("sample_eval: {nfe: []}", "Got sample_eval.nfe = []"),
        ("sample_writer: {num_steps: -1}", "Got num_steps = -1"),
        ("model: {net: {class_path: mf_lightning.nets.SiT, init_args: {num_classes: 5}}}", "expected the data set's 10"),
        ("model: {net: {class_path: mf_lightning.nets.SiT, init_args: {patch_size: 5}}}", "Got patch_size = 5"),
        ("sample_eval: {extractor: nothing}", "expected one of inception-v3-compat"),
        ("sample_eval: {extractor_weights: absent.pth}", "Got the extractor weights 'absent.pth'"),
        ("sample_eval: {reference: absent.npz}", "Got the reference 'absent.npz'"),
        ("ema: {decays: [1.5]}", "Got ema.decays = [1.5]"),
        ("data: {class_path: mf_lightning.data.LatentDataModule, init_args: {path: absent}}", "Got the data set path 'absent'"),
        ("data: {class_path: mf_lightning.data.SevenSegmentDataModule, init_args: {batch_size: 0}}", "Got data.batch_size = 0"),
        ("trainer: {accelerator: gpu, devices: 99}", "Got settings that Lightning refuses ("),
        ("trainer: {precision: bf16-true}", "Got trainer.precision = bf16-true, expected one of 32-true, bf16-mixed, 64-true"),
        ("model: {tf32: true}", "Got model.tf32 = true on cpu, expected a GPU"),
        ("model: {cuda_graphs: true, compile: true}", "Got model.cuda_graphs = true on cpu with model.compile = true"),
        (
            "model: {net: {class_path: mf_lightning.nets.SiT, init_args: {jvp_attention: flash, hidden_size: 72}}}",
            "Got model.net.init_args.jvp_attention = flash with 16 tokens, expected a multiple of 32",
        ),
        (
            "model: {loss: {class_path: mf_lightning.flow.MeanFlowLoss, init_args: {jvp_precision: 32-true}}}\n"
            "trainer: {precision: 64-true}",
            "Got model.loss.init_args.jvp_precision = 32-true for data in torch.float64",
        ),
    ],
)
def test_bad_settings_end_in_one_message(tmp_path, capsys, text, message):
    file = write(tmp_path / "bad.yaml", text)
    arguments = ["fit", *map(str, SMOKE), "--config", str(file), f"--trainer.default_root_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    found = capsys.readouterr().err
    assert message in " ".join(found[found.rindex("error: ") :].split())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_config_file():
    assert "Got --config nope.yaml, which is no file" in error_of(command_line("fit", "--config", "nope.yaml"))


def test_a_checkpoint_of_another_architecture_is_refused(smoke, tmp_path):
    checkpoint = smoke[0] / "checkpoints" / "last.ckpt"
    result = command_line(
        "test",
        *SMOKE,
        f"--trainer.default_root_dir={tmp_path}",
        f"--ckpt_path={checkpoint}",
        "--model.net.init_args.depth=3",
        "--model.net.init_args.qk_norm=true",
    )
    message = error_of(result)
    assert "another architecture (depth = 2, qk_norm = False), expected depth = 3, qk_norm = True" in message


def test_a_truncated_checkpoint_is_refused(smoke, tmp_path):
    whole = (smoke[0] / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    for name, message in (("cut.ckpt", "cannot be read"), ("absent.ckpt", "does not exist")):
        result = command_line("test", *SMOKE, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={tmp_path / name}")
        assert message in error_of(result)
