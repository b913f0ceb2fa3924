"""Export of samples: PNGs and npz of exactly N images, the same bytes however often it is killed and however many help."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from mf_lightning.callbacks.sample_files import NpzFiles
from mf_lightning.callbacks.sample_writer import shares
from mf_lightning.cli import load
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.image_npz import ImageNpz
from mf_lightning.metrics.reference import compute_reference
from mf_lightning.types import UserError
from tests.runs import RECIPES, ROOT

COUNT = 23
DDP = ["--trainer.strategy=ddp", "--trainer.devices=2"]
PREDICT = """
import os, signal, sys
import torch
from mf_lightning.callbacks import sample_files
from mf_lightning.cli import load

kill_after, seed, options = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
seen = 0


def counted(write):
    def wrapped(self, *args):
        global seen
        seen += 1
        if seen == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)  # in the middle: some of this batch's files are there
        return write(self, *args)

    return wrapped


sample_files.PngFiles._save = counted(sample_files.PngFiles._save)
sample_files.NpzFiles.write = counted(sample_files.NpzFiles.write)
run = load(options)
net_made = type(run.model).configure_model


def configure_model(self):
    net_made(self)
    generator = torch.Generator().manual_seed(seed)
    for parameter in self.net.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


type(run.model).configure_model = configure_model
run.trainer.predict(run.model, run.datamodule)
"""


def options(folder: Path, *more: str, count: int = COUNT, batch_size: int = 4) -> list[str]:
    return [
        f"--config={RECIPES / 'smoke.yaml'}", f"--trainer.default_root_dir={folder.parent}", f"--sample_writer.folder={folder}",
        f"--sample_writer.num_samples={count}", f"--sample_writer.batch_size={batch_size}", "--ema.decays=[]",
        "--sample_eval.num_samples=0", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
        "--trainer.logger=false", *more,
    ]  # fmt: skip


def process(folder: Path, *more: str, kill_after: int = 0, seed: int = 0, **sizes: int) -> subprocess.CompletedProcess:
    """Run `predict` on random weights of a seed in a process of its own."""
    script = folder.parent / "predict.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(PREDICT)
    return subprocess.run(
        [sys.executable, script, str(kill_after), str(seed), *options(folder, *more, **sizes)], cwd=ROOT, capture_output=True,
        text=True, timeout=150, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def here(folder: Path, *more: str, scale: float = 0.2, **sizes: int) -> None:
    """Run `predict` in this process."""
    run = load(options(folder, *more, **sizes))
    plain = run.model.configure_model

    def configure_model() -> None:
        plain()
        generator = torch.Generator().manual_seed(0)
        for parameter in run.model.net.parameters():
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))

    run.model.configure_model = configure_model
    run.trainer.predict(run.model, run.datamodule)


def result(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """Folders of an unbroken call, by format."""
    root = tmp_path_factory.mktemp("whole")
    for kind in ("png", "npz"):
        here(root / kind, f"--sample_writer.format={kind}")
    return {kind: root / kind for kind in ("png", "npz")}


def pixels(folder: Path) -> np.ndarray:
    if (folder / "samples.npz").exists():
        return np.load(folder / "samples.npz")["arr_0"][..., 0].astype(int)
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]).astype(int)


# what is written


def test_png_and_npz_hold_the_same_images_and_labels(whole):
    names = {f"{i:06d}.png" for i in range(COUNT)}
    assert set(result(whole["png"])) == {*names, "labels.csv", "samples.json"}
    assert set(result(whole["npz"])) == {"samples.npz", "labels.csv", "samples.json"}
    with np.load(whole["npz"] / "samples.npz", allow_pickle=False) as file:
        assert set(file) == {"arr_0", "arr_1"}
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (COUNT, 32, 32, 3)
    assert images.dtype == np.uint8
    assert (images == images[..., :1]).all()  # grey, repeated
    assert np.array_equal(pixels(whole["png"]), images[..., 0])
    assert all(Image.open(file).mode == "L" for file in whole["png"].glob("*.png"))
    assert len({image.tobytes() for image in images}) == COUNT
    assert labels.dtype == np.int64
    for folder in whole.values():
        rows = list(csv.DictReader((folder / "labels.csv").open()))
        assert [int(row["index"]) for row in rows] == list(range(COUNT))
        assert [int(row["label"]) for row in rows] == labels.tolist() == [i % 10 for i in range(COUNT)]


def test_adms_evaluator_reads_the_npz(whole):
    """Its steps (guided-diffusion, evaluations/evaluator.py): the member arr_0.npy is read as a stream, 64 images at a time,
    and mu is looked for among the names."""
    file = whole["npz"] / "samples.npz"
    with file.open("rb") as stream, zipfile.ZipFile(stream, "r") as archive:
        assert "arr_0.npy" in archive.namelist()
        assert archive.testzip() is None
        with archive.open("arr_0.npy", "r") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            assert not fortran
            assert not dtype.hasobject
            first = np.frombuffer(member.read(10 * 32 * 32 * 3), dtype).reshape(10, *shape[1:])
    assert "mu" not in list(np.load(file).keys())
    assert np.array_equal(first, np.load(file)["arr_0"][:10])
    assert shape == (COUNT, 32, 32, 3)


def test_torch_fidelity_reads_the_folder(whole):
    theirs = torch_fidelity.calculate_metrics(
        input1=str(whole["png"]), input2=str(whole["png"]), cuda=False, fid=True, verbose=False, cache=False, save_cpu_ram=True,
        feature_extractor="digits-cnn",
    )  # fmt: skip
    assert abs(theirs["frechet_inception_distance"]) < 1e-6
    reference = compute_reference(Extractor("digits-cnn"), ImageNpz(whole["npz"] / "samples.npz").batches(8), source="test")
    assert reference.about["count"] == COUNT


def test_images_depend_on_seed_and_number_only(whole, tmp_path):
    here(tmp_path / "one", batch_size=COUNT)
    worst = np.abs(pixels(tmp_path / "one") - pixels(whole["png"]))
    assert worst.max() <= 1  # a matrix product's last bit may depend on the batch size, a rounded pixel then too
    assert (worst > 0).mean() < 1e-3
    here(tmp_path / "few", count=9)
    for number in range(8):  # the same batches: the same bytes
        name = f"{number:06d}.png"
        assert (tmp_path / "few" / name).read_bytes() == (whole["png"] / name).read_bytes()
    here(tmp_path / "seed", "--sample_writer.seed=1", "--sample_writer.labels=uniform")
    assert np.abs(pixels(tmp_path / "seed") - pixels(whole["png"])).mean() > 5
    labels = [row["label"] for row in csv.DictReader((tmp_path / "seed" / "labels.csv").open())]
    assert labels != [str(i % 10) for i in range(COUNT)]


def test_without_classes_there_are_no_labels(tmp_path):
    unconditional = ["--model.net.init_args.num_classes=0", "--model.loss.init_args.guidance={omega: 1.0, kappa: 0.0}"]
    here(tmp_path / "out", "--sample_writer.format=npz", *unconditional, count=5)
    assert set(np.load(tmp_path / "out" / "samples.npz")) == {"arr_0"}
    assert (tmp_path / "out" / "labels.csv").read_text().split() == ["index,label"]


# killed, continued, shared


@pytest.mark.parametrize(("kind", "kills"), [("png", [7, 6]), ("npz", [3])])
def test_a_killed_call_goes_on_and_ends_with_the_same_bytes(tmp_path, whole, kind, kills):
    folder = tmp_path / "out"
    for kill_after in kills:
        killed = process(folder, f"--sample_writer.format={kind}", kill_after=kill_after)
        assert killed.returncode == -signal.SIGKILL
        assert not (folder / "labels.csv").exists()
        assert not (folder / "samples.npz").exists()
    again = process(folder, f"--sample_writer.format={kind}")
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"of {COUNT} images are in" in again.stdout
    assert result(folder) == result(whole[kind])
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*[0-9s].[pn]*")}
    assert before
    here(folder, f"--sample_writer.format={kind}")
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_two_processes_finish_what_one_began(tmp_path, whole, kind):
    folder = tmp_path / "out"
    process(folder, f"--sample_writer.format={kind}", kill_after=6 if kind == "png" else 3)
    both = process(folder, f"--sample_writer.format={kind}", *DDP)
    assert both.returncode == 0, both.stderr[-2000:]
    assert result(folder) == result(whole[kind])


def test_a_damaged_or_lost_png_is_made_again(tmp_path, whole):
    folder = tmp_path / "out"
    shutil.copytree(whole["png"], folder)
    (folder / "000003.png").write_bytes((folder / "000003.png").read_bytes()[:-20])
    (folder / "000022.png").unlink()
    (folder / ".000005.png.host.1.tmp").write_bytes(b"left over")
    here(folder)
    assert result(folder) == result(whole["png"])


def test_another_batch_size_goes_on_with_the_parts_that_are_there(tmp_path):
    folder = tmp_path / "out"
    killed = process(folder, "--sample_writer.format=npz", kill_after=3)
    assert killed.returncode == -signal.SIGKILL
    here(folder, "--sample_writer.format=npz", batch_size=5)
    assert pixels(folder).shape == (COUNT, 32, 32)
    one = tmp_path / "one"
    here(one, "--sample_writer.format=npz", batch_size=COUNT)
    assert np.abs(pixels(folder) - pixels(one)).max() <= 1


def test_images_of_two_settings_are_never_mixed(tmp_path, whole):
    folder = tmp_path / "out"
    shutil.copytree(whole["png"], folder)
    (folder / "000007.png").unlink()
    before = result(folder)
    for more, match in (
        (["--sample_writer.seed=1"], r"Got seed = 1 for .*, expected seed = 0"),
        (["--sample_writer.num_steps=2"], "num_steps = 2"),
        (["--sample_writer.format=npz"], "format = npz"),
        (["--sample_writer.labels=uniform"], "labels = uniform"),
    ):
        with pytest.raises(UserError, match=match):
            here(folder, *more)
    with pytest.raises(UserError, match=r"weights = \w+ for .* Give another sample_writer.folder"):
        here(folder, scale=0.3)
    with pytest.raises(UserError, match="num_samples = 40"):
        here(folder, count=40)
    assert result(folder) == before
    here(folder, "--sample_writer.seed=1", "--sample_writer.overwrite=true", count=6)
    assert len(list(folder.glob("*.png"))) == 6
    assert json.loads((folder / "samples.json").read_text())["seed"] == 1
    (folder / "samples.json").unlink()
    with pytest.raises(UserError, match=r"holds 000000.png without samples.json"):
        here(folder, count=6)


# the parts


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 4, 23, 24])
def test_batches_are_the_same_whoever_makes_them(count, processes):
    present = np.zeros(count, bool)
    present[4:8] = True
    present[9:10] = True
    size, made = min(4, count), {}
    lengths = set()
    for rank in range(processes):
        index, mine = shares(present, size, rank=rank, processes=processes)
        batches = index[rank::processes].split(size)
        lengths.add(len(batches) if len(index) else 0)
        for first, batch in zip(mine, batches, strict=bool(len(index))):
            if first is not None:
                assert first not in made
                made[first] = batch.tolist()
    assert len(lengths) == 1  # equally many calls of the network
    assert set(made) == {first for first in range(0, count, size) if not present[first : first + size].all()}
    for first, batch in made.items():
        assert batch == [min(first + i, count - 1) for i in range(size)]


def test_parts_are_joined_one_at_a_time(tmp_path):
    """A result of 60 MB from parts of 3 MB, in less memory than the result."""
    import tracemalloc

    files, side = NpzFiles(tmp_path), 128
    for first in range(0, 1200, 60):
        part = torch.full((60, 1, side, side), first % 251, dtype=torch.uint8)
        files.write(part, first, np.zeros(1200, bool))
    tracemalloc.start()
    files.finish(1200, np.arange(1200))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1e6 < most < 30e6
    assert (tmp_path / "samples.npz").stat().st_size > 55e6
    with np.load(tmp_path / "samples.npz") as file:
        images = file["arr_0"]
    assert images[:, 0, 0, 0].tolist() == [(i // 60 * 60) % 251 for i in range(1200)]
