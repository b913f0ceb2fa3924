"""Figures that do not compare stay apart: weights, averages, references, commands; and how evaluation says what it lacks."""

from __future__ import annotations

import json
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from lightning.pytorch.loggers.logger import DummyExperiment

from mf_lightning.__main__ import main as commands
from mf_lightning.assets import asset
from mf_lightning.callbacks import SafeWandbLogger
from mf_lightning.callbacks import generate as generating
from mf_lightning.callbacks.curves import Home, append_line, find_home, keep_lines, log_figures
from mf_lightning.callbacks.scoring import Beside
from mf_lightning.cli import load
from mf_lightning.flow.sampler import check_nfe
from mf_lightning.metrics import dinov2
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.fidelity import SampleQuality, bias_of_few, possible_metrics
from mf_lightning.metrics.reference import Reference, Statistics, identity, load_reference, save_reference
from mf_lightning.sheet import to_picture
from mf_lightning.types import UserError
from scripts import claim
from tests.runs import RECIPES
from tests.test_metrics import pictures

SMOKE = [
    f"--config={RECIPES / 'smoke.yaml'}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--trainer.logger=false", "--self_check.enabled=false",
]  # fmt: skip


def smoke(root, *options):
    return load([*SMOKE, f"--trainer.default_root_dir={root}", *options])


class Logged:
    """Takes what a module logs."""

    def __init__(self):
        self.seen: dict[str, tuple[float, bool]] = {}

    def log(self, key, value, logger=True, rank_zero_only=False):
        assert key not in self.seen
        self.seen[key] = (value, logger)


def row(ema, fid, *, stage="fit", step=3, protocol="aaaa"):
    told = {"protocol": {}, "protocol_id": protocol}
    return {"step": step, "stage": stage, "ema": ema, "nfe": 1, "fid": fid, **told}


# --- which curve


def test_a_run_that_goes_on_with_another_average_begins_another_curve():
    home = Home("aaaa", 0.999)
    module = Logged()
    for each in (row(0.99, 1.0), row(None, 2.0)):
        log_figures(module, each, first=0.99, home=home)
    assert module.seen == {
        "fid/nfe1": (1.0, False),  # for what watches it
        "fid/nfe1/ema0.99": (1.0, True),
        "fid/nfe1/raw": (2.0, True),
    }
    module = Logged()
    log_figures(module, row(0.999, 1.0, protocol="bbbb"), first=0.999, home=home)
    assert module.seen == {"fid/nfe1": (1.0, False), "fid/nfe1@bbbb": (1.0, True)}
    module = Logged()
    log_figures(module, row(0.999, 1.0), first=0.999, home=home)
    assert module.seen == {"fid/nfe1": (1.0, True)}


def test_what_test_measured_neither_begins_a_curve_nor_is_dropped(tmp_path):
    file = tmp_path / "sample_eval.jsonl"
    assert find_home(file) is None
    for each in (row(None, 9.0, stage="test", step=1, protocol="cccc"), row(0.9, 5.0, step=2), row(None, 4.0, stage="test")):
        append_line(file, each)
    append_line(file, row(0.9, 3.0))
    assert find_home(file) == Home("aaaa", 0.9)
    keep_lines(file, before=3)
    assert [json.loads(line)["fid"] for line in file.read_text().splitlines()] == [9.0, 5.0, 4.0]


def test_a_lost_wandb_makes_no_artifact(tmp_path):
    logger = SafeWandbLogger(save_dir=str(tmp_path), log_model="all")
    logger._experiment = DummyExperiment()
    (tmp_path / "best_nfe1.ckpt").write_bytes(b"weights")
    best = SimpleNamespace(best_model_path=str(tmp_path / "best_nfe1.ckpt"), best_model_score=None, monitor="fid/nfe1")
    logger._scan_and_log_checkpoints(best)
    assert not logger._logged_model_time


# --- references


def stub(name="dinov2-vit-s-14", dim=3, checksum="1" * 16):
    return SimpleNamespace(name=name, layer="dinov2", dim=dim, checksum=checksum)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (stub(), None),
        (stub(checksum="2" * 16), "made with"),
        (stub(name="dinov2-vit-l-14", dim=4), "made with"),
    ],
)
def test_statistics_of_another_dinov2_are_refused(tmp_path, theirs, message):
    extractor = Extractor("digits-cnn")
    statistics, about = Statistics(np.zeros(3), np.eye(3)), {**identity(extractor), "dinov2": identity(stub())}
    reference = Reference(np.zeros(96), np.eye(96), None, "t", about, dinov2=statistics)
    save_reference(tmp_path / "r.npz", reference)
    if message is None:
        assert load_reference(tmp_path / "r.npz", extractor, dinov2=theirs).dinov2.mu.shape == (3,)
    else:
        with pytest.raises(UserError, match=message):
            load_reference(tmp_path / "r.npz", extractor, dinov2=theirs)
    save_reference(tmp_path / "r.npz", Reference(np.zeros(96), np.eye(96), None, "t", {}, dinov2=statistics))
    with pytest.raises(UserError, match=r"with 3 features, expected 5"):  # a file that does not tell
        load_reference(tmp_path / "r.npz", extractor, dinov2=stub(dim=5))
    assert load_reference(tmp_path / "r.npz", extractor).dinov2 is not None  # nobody asks


def test_fd_on_dinov2_equals_torch_fidelitys_through_the_commands(tmp_path, capsys):
    """Random weights of the smallest published size, read from a file in its names."""
    import timm

    published = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=518, num_classes=0).state_dict()
    generator = torch.Generator().manual_seed(0)
    published = {key: 0.05 * torch.randn(value.shape, generator=generator) for key, value in published.items()}
    weights = str(tmp_path / "vits14.pth")
    torch.save(published, weights)
    folders, images = [], []
    for seed, n in ((1, 9), (6, 10)):
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        images.append(pictures(n, seed))
        for number, image in enumerate(images[-1]):
            to_picture(image).convert("RGB").save(folders[-1] / f"{number}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), cuda=False, fid=True, feature_extractor="dinov2-vit-s-14",
        feature_extractor_weights_path=weights, verbose=False, cache=False, save_cpu_ram=True, batch_size=4,
    )  # fmt: skip
    how = ["--extractor=digits-cnn", "--dinov2=dinov2-vit-s-14", f"--dinov2_weights={weights}"]
    commands(["reference", str(folders[1]), str(tmp_path / "r.npz"), *how])
    assert "FD-DINOv2 (dinov2-vit-s-14)" in capsys.readouterr().out
    digits, dino = Extractor("digits-cnn"), Extractor("dinov2-vit-s-14", weights=weights)
    reference = load_reference(tmp_path / "r.npz", digits, dinov2=dino)
    chosen, _ = possible_metrics(["fd_dinov2"], digits, reference, count=9, conditional=False, dinov2=dino)
    quality = SampleQuality(chosen, 9, digits, reference, dinov2=dino)
    for index in torch.arange(9).split(4):
        quality.update(images[0][index], None, index)
    assert quality.compute()["fd_dinov2"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert dinov2.MODELS.keys() >= {"dinov2-vit-s-14"}


def test_the_digits_extractor_takes_a_file_of_weights(tmp_path):
    own = Extractor("digits-cnn")
    assert Extractor("digits-cnn", weights=str(asset("digits/cnn.safetensors"))).checksum == own.checksum
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"sample_eval\.extractor_weights"):
        Extractor("digits-cnn", weights=str(tmp_path / "broken.safetensors"))


# --- what is said, and when


@pytest.mark.parametrize("nfe", [[1, 1], [2, 1, 2]])
def test_an_nfe_that_stands_twice_is_refused(nfe):
    with pytest.raises(UserError, match="each number of sampling steps once"):
        check_nfe("sample_eval.nfe", nfe)


def test_too_few_images_are_warned_of_and_missing_figures_told(tmp_path, capsys, caplog):
    extractor = Extractor("digits-cnn")
    assert bias_of_few(97, extractor) is None
    assert "96 images for 96 features" in bias_of_few(96, extractor)
    save_reference(tmp_path / "r.npz", Reference(np.zeros(96), np.eye(96), None, "t", {}))
    run = smoke(
        tmp_path, "--sample_eval.num_samples=50", "--sample_eval.extractor=digits-cnn",
        f"--sample_eval.reference={tmp_path / 'r.npz'}", "--sample_eval.nfe=[1]", "--trainer.limit_val_batches=1",
        "--ema.decays=[]",
    )  # fmt: skip
    with caplog.at_level("INFO"), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run.trainer.validate(run.model, run.datamodule, verbose=False)
    said = [str(warning.message) for warning in warned if "biased upwards" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith("50 images for 96 features")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Not scored: ")]
    assert len(lines) == 1
    for name in ("kid", "precision", "recall"):
        assert name in lines[0]


def test_an_average_that_is_not_kept_is_refused_before_training(tmp_path):
    run = smoke(tmp_path, "--ema.decays=[0.9]", "--sample_eval.emas=[0.9, 0.5]")
    with pytest.raises(UserError, match=r"with \[0.5\], which are not kept"):
        run.trainer.fit(run.model, run.datamodule)
    assert run.trainer.global_step == 0


def test_the_bar_says_which_nfe_average_and_how_many(tmp_path, monkeypatch):
    bars = []

    class Bar(generating.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": True})
            bars.append((self, []))

        def set_description(self, desc=None, refresh=True):
            bars[-1][1].append(desc)

        def update(self, n=1):
            bars[-1][1].append(n)

    monkeypatch.setattr(generating, "tqdm", Bar)
    run = smoke(
        tmp_path, "--sample_eval.num_samples=20", "--sample_eval.batch_size=15", "--sample_eval.nfe=[1, 4]",
        "--sample_eval.emas=[null]", "--ema.decays=[]", "--trainer.limit_val_batches=1", "--sample_grid.rows=0",
    )  # fmt: skip
    run.trainer.validate(run.model, run.datamodule, verbose=False)
    [(_, said)] = bars
    words = "Sampling NFE {} of 1, 4; raw weights"
    assert said == [words.format(1), 15, words.format(4), 15, words.format(1), 5, words.format(4), 5]


def test_seconds_per_image_count_what_was_computed(tmp_path, monkeypatch):
    """A compiled batch of 3 is filled up to 8: 1 s for the network, 0.5 s for decoding 3."""

    class Watch:
        def __init__(self, device):
            self.times = iter([1.0, 1.5])

        def seconds(self):
            return next(self.times)

    monkeypatch.setattr(generating, "Stopwatch", Watch)
    run = smoke(tmp_path, "--sample_eval.num_samples=0", "--ema.decays=[]", "--trainer.limit_val_batches=1")
    run.trainer.validate(run.model, run.datamodule, verbose=False)
    run.model.compiled = True
    how = {"num_steps": 1, "ema": None, "seed": 0, "labels": "balanced", "batch_size": 8, "timed": lambda batch: True}
    found = list(generating.generate(run.trainer, run.model, torch.arange(11), **how))
    assert [len(images.index) for images in found] == [8, 3]
    assert [images.seconds_per_image for images in found] == pytest.approx([1 / 8 + 0.5 / 8, 1 / 8 + 0.5 / 3])


def test_the_claim_refuses_at_the_door(tmp_path):
    for wrong in ({"nfe": [0, 1]}, {"num_samples": 1}, {"steps": 0}, {"nfe": [1, 1]}):
        with pytest.raises(UserError):
            claim.claim(root=str(tmp_path / "runs"), page=str(tmp_path / "page.md"), **wrong)
    assert not (tmp_path / "runs").exists()


# --- features beside generation


def test_jobs_beside_are_done_in_order_and_errors_are_raised():
    done, names = [], set()

    def job(number):
        done.append(number)
        names.add(threading.current_thread().name)
        if number == 7:
            raise ValueError("the seventh")

    with Beside(torch.device("cpu"), threaded=True) as beside:
        for number in range(7):
            beside.do(lambda number=number: job(number))
        beside.wait()
        assert done == list(range(7))
        beside.do(lambda: job(7))
        with pytest.raises(ValueError, match="the seventh"):
            beside.wait()
    assert names == {"scoring"}
    with pytest.raises(ValueError, match="the seventh"), Beside(torch.device("cpu"), threaded=True) as beside:
        beside.do(lambda: job(7))  # raised at the end at the latest


def test_figures_are_the_same_from_a_thread(tmp_path, monkeypatch):
    found = []
    for threaded in (False, True):
        monkeypatch.setattr(
            "mf_lightning.callbacks.sample_eval.Beside", lambda device, threaded=threaded: Beside(device, threaded=threaded)
        )
        run = smoke(
            tmp_path / str(threaded), "--sample_eval.num_samples=60", "--sample_eval.batch_size=25", "--ema.decays=[]",
            "--sample_eval.extractor=digits-cnn", "--sample_eval.metrics=[fid, inception_score]",
            "--trainer.limit_val_batches=1", "--sample_grid.rows=0",
        )  # fmt: skip
        run.trainer.validate(run.model, run.datamodule, verbose=False)
        found.append({key: float(value) for key, value in run.trainer.callback_metrics.items() if "nfe" in key})
    assert len(found[0]) == 4
    assert found[0] == found[1]
