"""Runs on a directory of latents with an AutoencoderKL: what is compared and refused before anything trains."""

import json

import numpy as np
import pytest
import torch

from mf_lightning.autoencoders import KLAutoencoder, PixelAutoencoder
from mf_lightning.cli import load, main
from mf_lightning.data.shards import DatasetInfo, read_info, write_info, write_shard
from mf_lightning.pixels import from_uint8, to_uint8
from mf_lightning.types import UserError
from tests.runs import RECIPES, lines

SHIPPED = "mf_lightning:digits/autoencoder"


@pytest.fixture(scope="module")
def autoencoder():
    return KLAutoencoder(SHIPPED)


@pytest.fixture
def latents(tmp_path, autoencoder):
    """A small data set made by the shipped autoencoder."""
    path = tmp_path / "latents"
    info = DatasetInfo(
        "moments", (4, 8, 8), "float16", False, autoencoder.id, autoencoder.scale, autoencoder.shift, 32, tuple("0123456789")
    )
    rng = np.random.default_rng(0)
    shards = {}
    for split, count in (("train", 64), ("val", 16)):
        moments = np.concatenate([rng.normal(size=(count, 4, 8, 8)), np.full((count, 4, 8, 8), 0.1)], 1).astype(np.float16)
        shards[split] = (write_shard(path, split, 0, latents=moments, labels=np.arange(count) % 10),)
    write_info(path, DatasetInfo(**{**info.__dict__, "splits": shards}))
    return path


def arguments(path, root, *more):
    return [
        "--config", str(RECIPES / "quickstart.yaml"), f"--data.init_args.path={path}", f"--trainer.default_root_dir={root}",
        "--trainer.max_steps=4", "--model.lr_schedule.init_args.warmup_steps=1", "--trainer.val_check_interval=2",
        "--data.init_args.batch_size=32", "--sample_eval.num_samples=120", "--sample_eval.reference=null",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--sample_grid.rows=1", *more,
    ]  # fmt: skip


def test_latents_train_decode_and_score_with_a_computed_reference(latents, tmp_path):
    root = tmp_path / "run"
    options = arguments(latents, root, "--sample_eval.reference=null", "--sample_eval.emas=[0.995, null]")
    cli = load(options)
    cli.trainer.fit(cli.model, cli.datamodule)
    rows = [json.loads(line) for line in (root / "sample_eval.jsonl").read_text().splitlines()]
    expected = [(step, nfe, ema) for step in (2, 4) for ema in (0.995, None) for nfe in (1, 2)]
    assert [(row["step"], row["nfe"], row["ema"]) for row in rows] == expected
    (reference,) = root.glob("reference-*.npz")
    assert rows[0]["protocol"]["reference"] == f"training split, decoded, {reference.stem.split('-')[1]}"
    assert {"fid/nfe1", "fid/nfe1/raw"} <= set(cli.trainer.callback_metrics)


def test_a_computed_reference_is_that_of_the_subset_in_every_command(latents, tmp_path):
    root, part = tmp_path / "run", "--data.init_args.subset={classes: ['3']}"
    names = []
    for stage, more in (("fit", [part]), ("test", [part]), ("test", [])):
        few = ["--data.init_args.batch_size=4", "--trainer.max_steps=2", *more]
        cli = load(
            arguments(latents, root, "--sample_eval.metrics=[fid]", "--sample_eval.nfe=[1]", "--sample_eval.emas=[null]", *few)
        )
        getattr(cli.trainer, stage)(cli.model, cli.datamodule)
        names.append(lines(root / "sample_eval.jsonl")[-1]["protocol"]["reference"])
    assert names[0] == names[1] != names[2]
    assert len(list(root.glob("reference-*.npz"))) == 2


def test_evaluation_images_depend_on_seed_and_number_only(latents, tmp_path):
    """FID is the same at another batch size, to the last bits of a matrix product."""
    found = []
    for size in (120, 7):
        options = arguments(latents, tmp_path / f"b{size}", f"--sample_eval.batch_size={size}", "--sample_eval.labels=uniform")
        cli = load([*options, "--trainer.precision=64-true"])  # in float32 a pixel in some thousands rounds the other way
        cli.trainer.fit(cli.model, cli.datamodule)
        found.append(cli.trainer.callback_metrics["fid/nfe2"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "dataset.json").unlink(), "without dataset.json"),
        (lambda path: (path / "train" / "00000.latents.npy").unlink(), "Got no file"),
        (lambda path: (path / "val" / "00000.labels.npy").write_bytes(b"\x93NUMPY"), "no whole .npy file"),
        (lambda path: np.save(path / "train" / "00000.labels.npy", np.full(64, 10)), "Got label 10 in row 0"),
    ],
)
def test_damaged_data_sets_stop_the_run_with_one_message(latents, tmp_path, capsys, damage, message):
    damage(latents)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments(latents, tmp_path / "run")])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_autoencoder_is_refused(latents, tmp_path, capsys):
    info = read_info(latents)
    write_info(latents, DatasetInfo(**{**info.__dict__, "autoencoder": "stabilityai/sd-vae-ft-mse@0123456789abcdef"}))
    with pytest.raises(SystemExit):
        main(["fit", *arguments(latents, tmp_path / "run")])
    message = " ".join(capsys.readouterr().err.split())
    assert "expected stabilityai/sd-vae-ft-mse@0123456789abcdef, which made these latents" in message


def test_inception_weights_that_cannot_be_had_stop_the_run_at_its_start(latents, tmp_path, capsys, monkeypatch):
    """The download fails here as on any machine without a network, and it fails before the first step."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3", "http://127.0.0.1:9/weights-inception.pth"
    )
    options = ["--sample_eval.extractor=inception-v3-compat", "--sample_eval.class_layer=null"]
    with pytest.raises(SystemExit):
        main(["fit", *arguments(latents, tmp_path / "run", *options)])
    message = " ".join(capsys.readouterr().err.split())
    assert "Got no feature extractor 'inception-v3-compat'" in message
    assert "sample_eval.extractor_weights" in message
    assert not (tmp_path / "run" / "metrics.csv").exists()


# autoencoders


def test_shipped_autoencoder_there_and_back(autoencoder):
    from mf_lightning.data.sources import load_digits

    images = torch.from_numpy(load_digits()["val"].images[::10])
    moments = autoencoder.encode(from_uint8(images))
    assert moments.shape == (50, 8, 8, 8)
    mean, std = moments.chunk(2, dim=1)
    assert (std > 0).all()
    assert (from_uint8(to_uint8(autoencoder.decode(mean))) - from_uint8(images)).square().mean() < 0.02
    assert autoencoder.id.startswith("mf_lightning:digits/autoencoder@")


def test_a_local_folder_is_the_same_autoencoder(autoencoder, tmp_path):
    autoencoder.net.save_pretrained(tmp_path / "copy")
    copy = KLAutoencoder(str(tmp_path / "copy"))
    assert copy.id.split("@")[1] == autoencoder.id.split("@")[1]
    assert copy.scale == autoencoder.scale


def test_autoencoders_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="which is no directory here"):
        KLAutoencoder(str(tmp_path / "absent")).decode(torch.zeros(1))
    with pytest.raises(UserError, match="give its path"):
        KLAutoencoder("nobody/nothing").decode(torch.zeros(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="could not be loaded"):
        KLAutoencoder(str(tmp_path / "empty")).decode(torch.zeros(1))


def test_pixels_are_their_own_latents():
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    pixel = PixelAutoencoder()
    assert torch.equal(pixel.decode(pixel.encode(x)), x)
    assert pixel.id == "pixel"
