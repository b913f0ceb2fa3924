"""Other projects' latents: what was written comes back, from each layout; damaged and foreign files are named, never taken."""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from mf_lightning.__main__ import main
from mf_lightning.data.datamodule import LatentDataModule
from mf_lightning.data.foreign import open_source
from mf_lightning.data.foreign.mar import NumbersUnpickler
from mf_lightning.data.shards import open_split, read_info
from mf_lightning.tools import adopt as tool
from mf_lightning.tools.adopt import adopt
from mf_lightning.tools.encode_out import EncodeOut
from mf_lightning.tools.hold import Hold
from mf_lightning.tools.verify import verify
from mf_lightning.types import UserError
from tests import foreign_latents as foreign
from tests.runs import ROOT, python

FACTS = {"autoencoder": "toy", "scale": 0.5, "shift": 0.25, "image_size": 32}
LAYOUTS = {  # name: kind, writer, options that the files do not tell
    "repa": ("repa", foreign.write_repa, {"classes": "3"}),
    "meanflow": ("meanflow", foreign.write_meanflow, {"classes": "3"}),
    "lmdb": ("mar", foreign.write_lmdb, {"classes": "3"}),
    "mar": ("mar", foreign.write_mar, FACTS),
    "lightningdit": ("lightningdit", foreign.write_lightningdit, {"classes": "3", **FACTS}),
    "npy": ("arrays", foreign.write_arrays, {"classes": "3", "holds": "mean_std", **FACTS}),
    "npz": ("arrays", foreign.write_npz, {"classes": "3", "holds": "mean_std", **FACTS}),
}
EACH = pytest.mark.parametrize("layout", LAYOUTS)


KINDS = sorted({kind for kind, _, _ in LAYOUTS.values()})


def adopted(layout: str, tmp_path: Path, *, dtype: str = "float32", shard_size: int = 4, **options) -> tuple:
    """Write a layout, adopt it, and return what was written and what a data set then holds."""
    kind, write, facts = LAYOUTS[layout]
    truth = write(tmp_path / "theirs", dtype=dtype)
    adopt(kind, tmp_path / "theirs", tmp_path / "ours", shard_size=shard_size, **{**facts, **options})
    return truth, *content(tmp_path / "ours")


def content(path: Path, split: str = "train") -> tuple:
    """Return latents, mirrored latents or None, and labels of a split."""
    shards = open_split(path, read_info(path), split, checksums=True)
    flipped = [shard.latents_flip for shard in shards]
    return (
        np.concatenate([shard.latents for shard in shards]),
        None if flipped[0] is None else np.concatenate(flipped),
        np.concatenate([shard.labels for shard in shards]),
    )


def as_std(parameters: np.ndarray, dtype: str) -> np.ndarray:
    """Return moments as diffusers itself makes them of mean and log-variance."""
    theirs = DiagonalGaussianDistribution(torch.from_numpy(parameters).float())
    mean, std = theirs.mean.numpy().astype(dtype), theirs.std.numpy().astype(dtype)
    return np.concatenate([mean, std], axis=1)


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# there and back


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_was_written_comes_back_bit_by_bit(layout, dtype, tmp_path):
    truth, stored, flipped, labels = adopted(layout, tmp_path, dtype=dtype)
    logvar = layout in ("lmdb", "mar")
    for theirs, ours in ((truth.stored, stored), (truth.flipped, flipped)):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            expected = as_std(theirs, dtype) if logvar else theirs
            assert ours.dtype == dtype
            assert (ours.view(np.uint8) == np.ascontiguousarray(expected).view(np.uint8)).all()
    assert (labels == truth.labels).all()
    info = read_info(tmp_path / "ours")
    assert info.kind == ("latents" if layout == "lightningdit" else "moments")
    assert info.latent_shape == (4, 4, 4)
    assert info.dtype == dtype
    assert [shard.count for shard in info.splits["train"]] == [4, 4, len(labels) - 8]


@pytest.mark.parametrize(
    ("layout", "autoencoder"),
    [("repa", "stabilityai/sd-vae-ft-mse"), ("meanflow", "stabilityai/sd-vae-ft-mse"), ("lmdb", "stabilityai/sd-vae-ft-ema")],
)
def test_facts_of_the_project(layout, autoencoder, tmp_path):
    adopted(layout, tmp_path)
    info = read_info(tmp_path / "ours")
    assert (info.autoencoder, info.scale, info.shift, info.image_size) == (autoencoder, 0.18215, 0.0, 32)
    assert info.class_names == ("0", "1", "2")


def test_options_come_before_the_projects_facts(tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    adopted("repa", tmp_path, scale=1.5, image_size=30, classes=str(tmp_path / "names.txt"))
    info = read_info(tmp_path / "ours")
    assert (info.scale, info.shift, info.image_size, info.class_names) == (1.5, 0.0, 30, ("ant", "bee", "cat"))


def test_class_folders_tell_the_names(tmp_path):
    adopted("mar", tmp_path)
    assert read_info(tmp_path / "ours").class_names == ("n01440000", "n01440001", "n01440002")


def test_a_local_autoencoder_tells_the_facts(tmp_path):
    foreign.write_lightningdit(tmp_path / "theirs")
    adopt("lightningdit", tmp_path / "theirs", tmp_path / "ours", classes="3", autoencoder="mf_lightning:digits/autoencoder")
    info = read_info(tmp_path / "ours")
    assert info.autoencoder.startswith("mf_lightning:digits/autoencoder@")
    assert info.scale == pytest.approx(1.0916)
    assert info.image_size == 4 * 4
    verify(tmp_path / "ours", grid=tmp_path / "grid.png")


def test_log_variance_is_clamped_as_diffusers_does(tmp_path):
    kind, write, facts = LAYOUTS["mar"]
    truth = write(tmp_path / "theirs")
    file = min((tmp_path / "theirs" / "n01440000").iterdir())
    moments = truth.stored[0].copy()
    moments[4, 0, 0], moments[4, 0, 1] = -100, 90
    np.savez(file, moments=moments, moments_flip=moments)
    adopt(kind, tmp_path / "theirs", tmp_path / "ours", **facts)
    first = content(tmp_path / "ours")[0][0]
    assert (first == as_std(moments[None], "float32")[0]).all()
    assert first[4, 0, 1] == np.float32(np.exp(10))


@pytest.mark.parametrize(
    ("protocol", "module"), [(3, b"numpy.core.multiarray"), *((number, b"numpy._core.multiarray") for number in (3, 4, 5))]
)
def test_pickled_arrays_of_any_numpy(protocol, module):
    array, label = np.arange(6, dtype=np.float16).reshape(2, 3), np.int64(4)
    pickled = pickle.dumps({"moments": array, "label": label}, protocol=protocol)
    if protocol == 3:  # names are lines of text there, so numpy 1's can be put in
        pickled = pickled.replace(b"numpy._core.multiarray", module)
    found = NumbersUnpickler(io.BytesIO(pickled)).load()
    assert found["moments"].dtype == np.float16
    assert (found["moments"] == array).all()
    assert found["label"] == 4


def test_bfloat16_is_stored_as_float32(tmp_path):
    truth = foreign.write_meanflow(tmp_path / "theirs")
    for number, file in enumerate(sorted((tmp_path / "theirs" / "train").iterdir())):
        torch.save({"image": torch.from_numpy(truth.stored[number]).bfloat16(), "label": torch.tensor(0)}, file)
    adopt("meanflow", tmp_path / "theirs", tmp_path / "ours", classes="1")
    assert (content(tmp_path / "ours")[0] == torch.from_numpy(truth.stored).bfloat16().float().numpy()).all()


def test_smaller_dtype_on_request(tmp_path):
    truth = foreign.write_repa(tmp_path / "theirs")
    adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="3", dtype="float16")
    stored = content(tmp_path / "ours")[0]
    assert stored.dtype == np.float16
    assert (stored == truth.stored.astype(np.float16)).all()


@EACH
def test_shuffled_and_held_out_samples_come_once(layout, tmp_path):
    truth, stored, _, labels = adopted(layout, tmp_path, shuffle_seed=3, val_fraction=0.3)
    held_out, _, held_out_labels = content(tmp_path / "ours", "val")
    assert len(held_out) == round(0.3 * len(truth.stored))
    means = truth.stored[:, :4].reshape(len(truth.stored), -1)
    order = []
    for rows, row_labels in ((stored, labels), (held_out, held_out_labels)):
        for row, label in zip(rows[:, :4].reshape(len(rows), -1), row_labels, strict=True):
            (number,) = np.flatnonzero((means == row).all(axis=1))
            assert truth.labels[number] == label
            order.append(int(number))
    assert sorted(order) == list(range(len(truth.stored)))
    assert order[: len(stored)] != sorted(order[: len(stored)])


def test_a_folder_for_val_and_training_reads_it(tmp_path):
    kind, write, facts = LAYOUTS["repa"]
    write(tmp_path / "theirs"), write(tmp_path / "theirs_val", count=5)
    adopt(kind, tmp_path / "theirs", tmp_path / "ours", val_source=tmp_path / "theirs_val", **facts)
    data = LatentDataModule(str(tmp_path / "ours"), batch_size=2)
    assert len(data.split("train")) == 10
    assert len(data.split("val")) == 5


def test_without_labels(tmp_path):
    foreign.write_repa(tmp_path / "theirs")
    (tmp_path / "theirs" / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": None}))
    adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="0")
    assert (content(tmp_path / "ours")[2] == 0).all()
    assert read_info(tmp_path / "ours").class_names == ()


@EACH
def test_no_more_than_a_shard_is_read_at_once(layout, tmp_path, monkeypatch):
    kind, write, facts = LAYOUTS[layout]
    write(tmp_path / "theirs")
    reader, asked = type(open_source(kind, tmp_path / "theirs", facts.get("holds"))), []
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda self, index: asked.append(len(index)) or read(self, index))
    adopt(kind, tmp_path / "theirs", tmp_path / "ours", shard_size=3, **facts)
    assert max(asked) == 3
    assert sum(asked) == read_info(tmp_path / "ours").count("train")


# interrupted


@pytest.mark.parametrize("layout", ["repa", "lmdb"])
def test_interrupted_and_started_again_gives_the_same_bytes(layout, tmp_path, monkeypatch):
    adopted(layout, tmp_path, shard_size=3, val_fraction=0.2)
    kind, _, facts = LAYOUTS[layout]
    write, calls = tool.write_shard, []

    def failing(*args, **kwargs):
        calls.append(args[2])
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    monkeypatch.setattr(tool, "write_shard", failing)
    again = {"out": tmp_path / "again", "shard_size": 3, "val_fraction": 0.2, **facts}
    with pytest.raises(UserError, match=r"00002' not written \(No space left on device\)"):
        adopt(kind, tmp_path / "theirs", **again)
    assert not (tmp_path / "again" / "dataset.json").exists()
    whole = {file: file.stat().st_mtime_ns for file in (tmp_path / "again" / "train").iterdir()}
    adopt(kind, tmp_path / "theirs", **again)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "ours")
    assert all(file.stat().st_mtime_ns == before for file, before in whole.items())
    assert calls[3] == 2


@pytest.mark.parametrize("fsync", [1, 2, 6])
def test_killed_in_the_middle_of_a_write(fsync, tmp_path):
    adopted("repa", tmp_path, shard_size=3)
    killed = f"""
import os, signal
from pathlib import Path
from mf_lightning.tools.adopt import adopt
calls, real = [], os.fsync
def fsync(handle):
    calls.append(handle)
    if len(calls) == {fsync}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
adopt("repa", Path("theirs"), Path("again"), classes="3", shard_size=3)
"""
    result = python("-c", killed, cwd=tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list((tmp_path / "again").rglob(".*.tmp")), "the kill came in the middle of a write"
    with pytest.raises(UserError, match=r"without dataset\.json"):
        read_info(tmp_path / "again")
    adopt("repa", tmp_path / "theirs", tmp_path / "again", classes="3", shard_size=3)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "ours")


def test_killed_between_the_last_file_and_tidying_up(tmp_path, monkeypatch):
    adopted("repa", tmp_path)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["dataset.json", "train"]
    monkeypatch.setattr(shutil, "rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adopt("repa", tmp_path / "theirs", tmp_path / "again", shard_size=4, classes="3")
    monkeypatch.undo()
    verify(tmp_path / "again")
    adopt("repa", tmp_path / "theirs", tmp_path / "again", shard_size=4, classes="3")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "ours")


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path, monkeypatch):
    adopted("repa", tmp_path, shard_size=3)
    monkeypatch.setattr(tool, "write_info", lambda out, info: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"dataset\.json' not written"):
        adopt("repa", tmp_path / "theirs", tmp_path / "again", classes="3", shard_size=3)
    monkeypatch.undo()
    file = tmp_path / "again" / "train" / "00001.latents.npy"
    file.write_bytes(file.read_bytes()[:-3])
    adopt("repa", tmp_path / "theirs", tmp_path / "again", classes="3", shard_size=3)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "ours")


def test_a_disk_without_room(tmp_path):
    foreign.write_repa(tmp_path / "theirs", count=40)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a shard of 20 has 20 x 128 x 4 bytes
    try:
        with pytest.raises(UserError, match=r"not written \(File too large\).*same command again"):
            adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="3", shard_size=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "ours").rglob("*.npy"))
    adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="3", shard_size=20)
    verify(tmp_path / "ours")


def test_another_adoption_does_not_go_on_with_this_one(tmp_path, monkeypatch):
    foreign.write_repa(tmp_path / "theirs")
    monkeypatch.setattr(tool, "write_info", lambda out, info: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="not written"):
        adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="3")
    before = files_of(tmp_path / "ours")
    shutil.copytree(tmp_path / "theirs", tmp_path / "of_another_autoencoder")  # of the same names and labels
    with pytest.raises(UserError, match="unfinished adoption of another source, expected the same"):
        adopt("repa", tmp_path / "of_another_autoencoder", tmp_path / "ours", classes="3")
    with pytest.raises(UserError, match="unfinished adoption of another shard_size, expected the same"):
        adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="3", shard_size=7)
    shutil.rmtree(tmp_path / "theirs")
    foreign.write_repa(tmp_path / "theirs", count=11)
    with pytest.raises(UserError, match="unfinished adoption of another splits"):
        adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="3")
    assert files_of(tmp_path / "ours") == before


def test_two_jobs_at_one_folder(tmp_path):
    adopted("repa", tmp_path, shard_size=3)
    slow = """
import time
from pathlib import Path
from mf_lightning.tools import adopt as tool
write = tool.write_shard
def write_shard(*args, **kwargs):
    shard = write(*args, **kwargs)
    if args[2] == 1:
        print("here", flush=True)
        time.sleep(600)
    return shard
tool.write_shard = write_shard
tool.adopt("repa", Path("theirs"), Path("again"), classes="3", shard_size=3)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", slow], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"here\n"
        before = files_of(tmp_path / "again")
        with pytest.raises(UserError, match=r"OUT = '.*again', at which another job is working, expected one at a time"):
            adopt("repa", tmp_path / "theirs", tmp_path / "again", classes="3", shard_size=3)
        with pytest.raises(UserError, match=r"holds '\.adopt'"):
            EncodeOut(tmp_path / "again").begin({})
        assert files_of(tmp_path / "again") == before
    finally:
        first.kill()
        first.communicate()
    adopt("repa", tmp_path / "theirs", tmp_path / "again", classes="3", shard_size=3)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "ours")


def test_two_commands_that_begin_at_once(tmp_path):
    foreign.write_repa(tmp_path / "theirs")
    hold = Hold(tmp_path / "ours")
    for begin in (
        lambda: adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="3"),
        lambda: EncodeOut(tmp_path / "ours").begin({}),
    ):
        with pytest.raises(UserError, match="at which another job is working"):
            begin()
    hold.release()
    assert not list((tmp_path / "ours").iterdir())
    adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="3")


# what is refused


def refused(layout: str, tmp_path: Path, match: str, **options) -> None:
    """Adopt a layout that a test has spoiled; nothing may look like a data set afterwards."""
    kind, _, facts = LAYOUTS[layout]
    with pytest.raises(UserError, match=match):
        adopt(kind, tmp_path / "theirs", tmp_path / "ours", **{**facts, **options})
    assert not (tmp_path / "ours" / "dataset.json").exists()


@EACH
def test_an_empty_folder(layout, tmp_path):
    (tmp_path / "theirs").mkdir()
    refused(layout, tmp_path, r"theirs', an empty folder, expected .*Check KIND")
    (tmp_path / "theirs").rmdir()
    refused(layout, tmp_path, r"theirs', which does not exist")


@pytest.mark.parametrize(
    ("layout", "kind"), [(layout, kind) for layout, (right, _, _) in LAYOUTS.items() for kind in KINDS if kind != right]
)
def test_the_wrong_kind_is_told_the_right_one(layout, kind, tmp_path):
    right, write, _ = LAYOUTS[layout]
    write(tmp_path / "theirs")
    options = {**FACTS, "classes": "3", "holds": "mean_std" if kind == "arrays" else None}
    with pytest.raises(UserError, match=rf"which looks like the kind {right}, expected"):
        adopt(kind, tmp_path / "theirs", tmp_path / "ours", **options)


def first_file(path: Path) -> Path:
    return next(file for file in sorted(path.rglob("*")) if file.suffix in (".npy", ".pt", ".npz", ".safetensors", ".mdb"))


@EACH
@pytest.mark.parametrize("left", [0.0, 0.4, 0.97])
def test_a_truncated_file_is_named(layout, left, tmp_path):
    LAYOUTS[layout][1](tmp_path / "theirs")
    file = first_file(tmp_path / "theirs")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole))] if layout != "lmdb" else whole[: int(left * 0.6 * len(whole))])
    refused(layout, tmp_path, rf"{file.name}.* cannot be read")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "lmdb"])  # LMDB has no checksums of its pages
def test_any_damaged_bytes_end_in_a_message(layout, tmp_path):
    kind, write, facts = LAYOUTS[layout]
    write(tmp_path / "theirs")
    file, rng = first_file(tmp_path / "theirs"), np.random.default_rng(0)
    whole, refusals = file.read_bytes(), 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 400), rng.integers(1, 10)):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        try:
            adopt(kind, tmp_path / "theirs", tmp_path / "ours", **facts)
        except UserError:
            refusals += 1
    assert refusals > 10


@pytest.mark.parametrize("layout", ["repa", "meanflow", "lmdb", "mar", "npy", "npz"])
def test_code_in_a_pickle_is_never_run(layout, tmp_path):
    LAYOUTS[layout][1](tmp_path / "theirs")
    ran, file = tmp_path / "ran", first_file(tmp_path / "theirs")

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    if layout == "meanflow":
        torch.save({"image": torch.zeros(8, 4, 4), "label": Code()}, file)
    elif layout == "lmdb":
        import lmdb

        with lmdb.open(str(tmp_path / "theirs"), map_size=1 << 22) as environment, environment.begin(write=True) as writing:
            writing.put(b"5", pickle.dumps({"moments": Code()}))
    elif layout in ("mar", "npz"):
        name = "latents" if layout == "npz" else "moments"
        np.savez(file, **{name: np.array([Code()], dtype=object), "moments_flip": np.zeros(1), "labels": np.zeros(1, int)})
    else:
        np.save(file, np.array([Code()], dtype=object), allow_pickle=True)
    refused(layout, tmp_path, r"cannot be read .*code in it is never run")
    assert not ran.exists()


@pytest.mark.parametrize("layout", ["repa", "meanflow", "mar", "lightningdit", "npy"])
def test_mixed_shapes(layout, tmp_path):
    LAYOUTS[layout][1](tmp_path / "theirs")
    files = [file for file in sorted((tmp_path / "theirs").rglob("*")) if file.suffix == first_file(tmp_path / "theirs").suffix]
    small = np.zeros((8, 4, 3), np.float32)
    if layout == "repa":
        np.save(files[3], small)
    elif layout == "meanflow":
        torch.save({"image": torch.from_numpy(small), "label": torch.tensor(0)}, files[3])
    elif layout == "mar":
        np.savez(files[3], moments=np.zeros((8, 4, 4), np.float32), moments_flip=small)
    elif layout == "lightningdit":
        from safetensors.numpy import save_file

        odd = np.zeros((2, 4, 4, 3), np.float32)
        save_file({"latents": odd, "latents_flip": odd, "labels": np.zeros(2, np.int64)}, tmp_path / "theirs" / "z.safetensors")
    else:
        np.save(tmp_path / "theirs" / "b_moments.npy", small[None].repeat(4, 0))
    refused(layout, tmp_path, r"Got \(\d, 4, 3\) values of float32 in .*expected \(\d, 4, 4\) of float32 as in .*one shape")


@EACH
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(layout, bad, tmp_path, monkeypatch):
    original = foreign.posterior

    def spoiled(count, **kwargs):
        values = original(count, **kwargs)
        values[6, 1, 2, 3] = bad
        return values

    monkeypatch.setattr(foreign, "posterior", spoiled)
    LAYOUTS[layout][1](tmp_path / "theirs")
    if layout == "lightningdit":
        from safetensors.torch import load_file, save_file

        file = tmp_path / "theirs" / "latents_rank00_shard001.safetensors"
        tensors = load_file(file)
        tensors["latents"][0, 1, 2, 3] = bad
        save_file(tensors, file)
    where = {"repa": "00000006.npy", "meanflow": "00000006.pt", "lmdb": "key 6", "mar": "_6.JPEG.npz", "npz": "0.npz', row 6"}
    refused(layout, tmp_path, rf"not finite in .*{where.get(layout, 'row 0')}")


def test_overflow_of_float16(tmp_path):
    truth = foreign.write_repa(tmp_path / "theirs")
    truth.stored[2, 0, 0, 0] = 70_000
    np.save(tmp_path / "theirs" / "vae-sd" / "00000" / "img-mean-std-00000002.npy", truth.stored[2])
    refused("repa", tmp_path, r"not finite as float16, whose range ends at 65,504; .*00000002\.npy", dtype="float16")


def test_log_variance_is_not_taken_for_std_nor_std_for_log_variance(tmp_path):
    foreign.write_mar(tmp_path / "mar")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "a" / "latents.npy", foreign.posterior(5, logvar=True))
    np.save(tmp_path / "b" / "latents.npy", foreign.posterior(5, logvar=False))
    for folder in ("a", "b"):
        np.save(tmp_path / folder / "labels.npy", np.zeros(5, int))
    with pytest.raises(UserError, match=r"a standard deviation below 0 in .*row 0 .*may be a log-variance"):
        adopt("arrays", tmp_path / "a", tmp_path / "ours_a", classes="1", holds="mean_std", **FACTS)
    with pytest.raises(UserError, match=r"no log-variance below 0 .*may be a std"):
        adopt("arrays", tmp_path / "b", tmp_path / "ours_b", classes="1", holds="mean_logvar", **FACTS)


def test_labels_that_do_not_match_files(tmp_path):
    foreign.write_repa(tmp_path / "theirs")
    file = tmp_path / "theirs" / "vae-sd" / "dataset.json"
    pairs = json.loads(file.read_text())["labels"]
    first = "00000/img-mean-std-00000000.npy"
    for changed, match in (
        (pairs[1:], rf"1 files without a label, 0 labels without a file; '{first}' has no label"),
        ([*pairs, ["x.npy", 0]], r"0 files without a label, 1 labels without a file; 'x.npy' has no file"),
        ([*pairs, pairs[0]], "1 names occur twice"),
        ([[pairs[0][0], 0.5], *pairs[1:]], r"Got the label 0.5 of '.*00000000.npy', expected one whole number"),
        (
            [[pairs[0][0], 3], *pairs[1:]],
            r"Got label 3 in row 0 of 'shard 0 of train, .*00000000.npy.*expected labels in \[0, 3\)",
        ),
    ):
        file.write_text(json.dumps({"labels": changed}))
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        refused("repa", tmp_path, match)
    file.write_text('{"labels": [[')
    refused("repa", tmp_path, r"dataset.json', which cannot be read")


def test_arrays_whose_labels_do_not_match(tmp_path):
    foreign.write_arrays(tmp_path / "theirs")
    np.save(tmp_path / "theirs" / "b_labels.npy", np.zeros(3, int))
    refused("npy", tmp_path, r"Got labels \(3,\) of int64 for '.*b_moments.npy'")
    (tmp_path / "theirs" / "b_labels.npy").unlink()
    refused("npy", tmp_path, r"without 'b_labels.npy' beside it")


def test_an_lmdb_that_is_not_finished(tmp_path):
    import lmdb

    foreign.write_lmdb(tmp_path / "theirs")
    with lmdb.open(str(tmp_path / "theirs"), map_size=1 << 22) as environment, environment.begin(write=True) as writing:
        writing.delete(b"7")
    refused("lmdb", tmp_path, r"Got no .*data.mdb', key 7, expected the keys 0 to 11")
    with lmdb.open(str(tmp_path / "theirs"), map_size=1 << 22) as environment, environment.begin(write=True) as writing:
        writing.delete(b"num_samples")
    refused("lmdb", tmp_path, "num_samples = None")


def test_facts_that_are_missing(tmp_path):
    foreign.write_lightningdit(tmp_path / "theirs")
    options = {"autoencoder": None, "scale": None, "shift": None, "image_size": None}
    refused("lightningdit", tmp_path, "expected --autoencoder, --scale, --shift, --image_size as well", **options)
    options["autoencoder"] = "hustvl/vavae-imagenet256-f16d32-dinov2"
    refused("lightningdit", tmp_path, "expected --scale, --shift, --image_size as well", **options)
    refused("lightningdit", tmp_path, "Got no --classes", classes=None)
    refused("lightningdit", tmp_path, "Got --classes ten, expected a number, or a file", classes="ten")
    refused("lightningdit", tmp_path, "Got --holds latents for the kind lightningdit", holds="latents")


@EACH
def test_links_out_of_the_folder_are_taken_on_request_only(layout, tmp_path):
    kind, write, facts = LAYOUTS[layout]
    truth, outside = write(tmp_path / "theirs"), tmp_path / "outside"
    file = first_file(tmp_path / "theirs")
    moved = file.parent if layout in ("repa", "mar") else file  # these have folders below the one that is read
    moved.rename(outside)
    moved.symlink_to(outside)
    refused(layout, tmp_path, rf"symbolic link '.*{moved.name}' to '{outside}', expected only links within .*follow_links=true")
    assert not (tmp_path / "ours").exists()
    adopt(kind, tmp_path / "theirs", tmp_path / "ours", follow_links=True, **facts)
    assert (content(tmp_path / "ours")[2] == truth.labels).all()


@pytest.mark.parametrize(("layout", "name"), [("repa", "vae-sd"), ("meanflow", "train"), ("npy", "b_labels.npy")])
def test_links_of_what_belongs_to_a_layout(layout, name, tmp_path):
    kind, write, facts = LAYOUTS[layout]
    write(tmp_path / "theirs")
    (tmp_path / "theirs" / name).rename(tmp_path / "outside")
    (tmp_path / "theirs" / name).symlink_to(tmp_path / "outside")
    refused(layout, tmp_path, rf"symbolic link '.*{name}' to '{tmp_path / 'outside'}'")
    (tmp_path / "theirs" / name).unlink()
    (tmp_path / "theirs" / name).symlink_to(tmp_path / "theirs")
    if layout == "repa":
        refused(layout, tmp_path, "a circle", follow_links=True)
    (tmp_path / "theirs" / name).unlink()
    (tmp_path / "outside").rename(tmp_path / "theirs" / f"real_{name}")
    (tmp_path / "theirs" / name).symlink_to(f"real_{name}")
    (tmp_path / "link").symlink_to("theirs")  # SOURCE itself may be one
    adopt(kind, tmp_path / "link", tmp_path / "ours", **facts)


@EACH
def test_hidden_files_and_folders_are_no_samples(layout, tmp_path):
    truth = LAYOUTS[layout][1](tmp_path / "theirs")
    file = first_file(tmp_path / "theirs")
    if layout != "lmdb":
        (file.parent / f"._{file.name}").write_bytes(b"Mac OS X")
    (tmp_path / "theirs" / ".ipynb_checkpoints").mkdir()
    shutil.copy(file, tmp_path / "theirs" / ".ipynb_checkpoints" / file.name)
    adopt(LAYOUTS[layout][0], tmp_path / "theirs", tmp_path / "ours", **LAYOUTS[layout][2])
    assert (content(tmp_path / "ours")[2] == truth.labels).all()


def test_a_class_folder_without_files_would_shift_the_labels(tmp_path):
    foreign.write_mar(tmp_path / "theirs")
    (tmp_path / "theirs" / "n01440000_old").mkdir()
    refused("mar", tmp_path, r"class folder '.*n01440000_old' without an .npz file \(1 such folders\), expected some in each")


def test_classes_without_samples_are_told(tmp_path, capsys):
    adopted("repa", tmp_path, classes="5")
    assert "warning: only 3 of 5 classes have samples; is --classes right?" in capsys.readouterr().out
    foreign.write_meanflow(tmp_path / "one", count=1)
    adopt("meanflow", tmp_path / "one", tmp_path / "ours_of_one", classes="3")
    assert "warning: all samples are of one class" in capsys.readouterr().out
    adopt("meanflow", tmp_path / "one", tmp_path / "ours_without", classes="0")
    assert "warning" not in capsys.readouterr().out


def test_a_destination_in_use(tmp_path):
    adopted("repa", tmp_path)
    before = files_of(tmp_path / "ours")
    with pytest.raises(UserError, match="already holds a data set"):
        adopt("repa", tmp_path / "theirs", tmp_path / "ours", classes="3")
    with pytest.raises(UserError, match=r"which is a data set of this project already"):
        adopt("repa", tmp_path / "ours", tmp_path / "more", classes="3")
    assert files_of(tmp_path / "ours") == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="which holds other files"):
        adopt("repa", tmp_path / "theirs", tmp_path / "notes", classes="3")
    assert files_of(tmp_path / "notes") == {"thesis.txt": b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"Got OUT = '.*file', which is a file, expected a new or empty folder"):
        adopt("repa", tmp_path / "theirs", tmp_path / "file", classes="3")
    with pytest.raises(UserError, match="inside of"):
        adopt("repa", tmp_path / "theirs", tmp_path / "theirs" / "ours", classes="3")


def test_options_that_contradict(tmp_path):
    foreign.write_repa(tmp_path / "theirs")
    refused("repa", tmp_path, "--shard_size 0", shard_size=0)
    refused("repa", tmp_path, "--shuffle_seed -1", shuffle_seed=-1)
    refused("repa", tmp_path, "Got --scale 0.0, expected a number other than 0", scale=0.0)
    refused("repa", tmp_path, "Got --shift nan, expected a number", shift=float("nan"))
    refused("repa", tmp_path, "Got --image_size 0, expected pixels", image_size=0)
    for share, count in ((1.0, 10), (0.01, 0), (-0.2, -2)):
        refused("repa", tmp_path, f"Got --val_fraction {share} of 10 samples, which leaves {count}", val_fraction=share)
    refused("repa", tmp_path, "one of the last two", val_fraction=0.1, val_source=tmp_path / "theirs")
    foreign.write_repa(tmp_path / "half", dtype="float16")
    refused("repa", tmp_path, "Got dtype = float16 in --val_source, expected float32", val_source=tmp_path / "half")


def test_the_command(tmp_path, capsys, monkeypatch):
    foreign.write_repa(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    main(["adopt", "repa", "theirs", "ours", "--classes=3", "--val_fraction=0.2", "--dtype=float16"])
    assert "Wrote 8 train, 2 val samples to ours: moments of shape (4, 4, 4), float16, 3 classes" in capsys.readouterr().out
    main(["verify", "ours"])
    with pytest.raises(SystemExit) as ended:
        main(["adopt", "meanflow", "theirs", "other", "--classes=3"])
    assert ended.value.code == 2
    assert "which looks like the kind repa" in capsys.readouterr().err
