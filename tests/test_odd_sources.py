"""Sources that look whole and are not, labels that only seem right, and other ways in which an image could be lost silently."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mf_lightning.autoencoders import KLAutoencoder, PixelAutoencoder
from mf_lightning.data import crop
from mf_lightning.data.datamodule import LatentDataModule
from mf_lightning.data.images import Unreadable, open_images
from mf_lightning.types import UserError
from tests.runs import ROOT
from tests.test_encode import run, tree
from tests.test_images import (
    IMAGES,
    encoded,
    picture,
    pixels_of,
    tar_bytes,
    write_folder,
    write_parquet,
    write_tar,
    write_zip,
)

LABELLED = {"a.png": IMAGES["ant/0.png"], "labels.csv": b"a.png,0\n" * 50}


def labels_of(tmp_path: Path, name: str, content: str) -> Path:
    return write_folder(tmp_path / "s", {"a.png": b"", "b.png": b"", name: content.encode()})


# archives


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_tar_that_ends_early_is_no_shorter_source(tmp_path, mode, inner):
    """Python's tarfile takes a damaged head for the end of the archive, and so does it the end of the file."""
    content = tar_bytes(IMAGES)
    head = content.index(b"bee/1.png")
    damaged = content[: head + 150] + b"77" + content[head + 152 :]
    for k, broken in enumerate((damaged, content[:head])):
        path = tmp_path / f"{k}.tar"
        if inner:
            write_tar(path, {"ant.tar": broken}, mode)
        else:
            path.write_bytes(gzip.compress(broken) if mode == "w:gz" else broken)
        with pytest.raises(UserError, match=r"whose list of files cannot be read \(.*after 'bee/0.png'.*whole tar file"):
            open_images(path)


def test_compressed_tars_inside_a_tar_are_refused(tmp_path):
    with pytest.raises(UserError, match="whose list of files cannot be read"):
        open_images(write_tar(tmp_path / "s.tar", {"ant.tar": gzip.compress(tar_bytes(IMAGES))}))


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_damaged_compression(tmp_path, mode):
    path = write_tar(tmp_path / f"s.tar.{mode}", IMAGES, f"w:{mode}")
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\xff" * 200 + content[middle + 200 :])
    with pytest.raises(UserError, match=r"s\.tar.*cannot be read"):
        open_images(path)
    path.write_bytes(content)
    found = open_images(path)
    path.write_bytes(content[:middle] + b"\xff" * 200 + content[middle + 200 :])
    found.reader.open_files.files.clear()
    with pytest.raises(Unreadable, match="damaged in the tar file"):
        found.read(len(found) - 1)


def test_a_labels_file_in_an_archive_that_cannot_be_read(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "s.zip", LABELLED)
    content = bytearray(path.read_bytes())
    data = content.index(b"labels.csv") + 12
    content[data : data + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"labels file '.*s\.zip/labels\.csv', which cannot be read \(damaged.*--labels"):
        open_images(path)
    assert len(open_images(path, labels="none")) == 1
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("labels.csv", "a.png"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
            tar.addfile(link)
    with pytest.raises(UserError, match=r"labels file '.*s\.tar/labels\.csv', which cannot be read \(a link"):
        open_images(tmp_path / "s.tar")
    monkeypatch.setattr("mf_lightning.data.images.source.MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"labels\.csv', which cannot be read \(more than 100 bytes"):
        open_images(write_zip(tmp_path / "bomb.zip", LABELLED))


def test_parquet_files_of_different_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "s" / "a.parquet", IMAGES)
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "s" / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet' with the columns image, expected label among them"):
        open_images(tmp_path / "s")
    pq.write_table(pa.table({"img": [b"x"], "label": [0]}), tmp_path / "s" / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet' with the columns img, label, expected image among them"):
        open_images(tmp_path / "s")


# what is meant


def test_splits_are_not_taken_for_classes(tmp_path):
    both = {f"{split}/{name}": content for split in ("train", "Val") for name, content in IMAGES.items()}
    with pytest.raises(UserError, match=r"the folders Val, train in .*look like splits.*--val_source"):
        open_images(write_folder(tmp_path / "s", both))
    with pytest.raises(UserError, match="look like splits"):
        open_images(write_zip(tmp_path / "s.zip", {f"cifar/{name}": content for name, content in both.items()}))
    assert open_images(write_folder(tmp_path / "t", {"train/0.png": b"", "tram/0.png": b""})).class_names == ("train", "tram")


def test_tars_of_several_splits_beside_each_other(tmp_path):
    for name in ("imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar"):
        write_tar(tmp_path / name, {f"{name}.jpg": b"", f"{name}.cls": b"0"})
    with pytest.raises(UserError, match=r"several splits \(train, validation\).*\*train\*.*--val_source"):
        open_images(tmp_path)
    assert len(open_images(tmp_path / "*train*")) == 2


def test_archives_beside_images_leave_it_open_what_is_meant(tmp_path):
    root = write_folder(tmp_path / "s", IMAGES)
    write_zip(root / "orig.zip", {"k/0.png": b"", "m/0.png": b""})
    with pytest.raises(UserError, match=r"both images \('\w+/\d.png'\) and .*'orig.zip'"):
        open_images(root)
    assert len(open_images(root / "*.zip")) == 2


def test_a_pipe_is_no_image(tmp_path):
    root = write_folder(tmp_path / "s", {"k/0.png": b"x"})
    os.mkfifo(root / "k" / "1.png")
    with pytest.raises(Unreadable, match="no regular file"):
        open_images(root).read(1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.csv", "a.png,--3\nb.png,1\n", "the label '--3' among numbers"),
        ("labels.csv", "a.png,\nb.png,x\n", "an empty label"),
        ("labels.csv", "a.png,\nb.png,1\n", "an empty label"),
        ("labels.json", '{"a.png": 1, "a.png": 2, "b.png": 0}', r"'a.png' twice, with 1 and 2"),
        ("labels.json", '{"labels": [5]}', "5 is not a name and a label"),
        ("labels.json", '{"labels": null}', "it has no labels.*--labels=none"),
    ],
)
def test_labels_that_are_none(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        open_images(labels_of(tmp_path, name, content))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = labels_of(tmp_path, "notes.txt", "")
    (tmp_path / "given.json").write_text('{"a.png": 1, "b.png": 0}')
    assert open_images(folder, labels="~/given.json").labels.tolist() == [1, 0]
    assert KLAutoencoder("~/vae").pretrained == str(tmp_path / "vae")


# odd pictures


def test_a_grey_of_sixteen_bits_that_is_transparent(tmp_path):
    deep = np.full((8, 8), 1000, np.uint16)
    deep[:, 4:] = 40_000
    pixels, traits = pixels_of(encoded(Image.fromarray(deep), transparency=1000))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == round(40_000 / 257)).all()
    assert traits == (crop.DEEP, crop.TRANSPARENT)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_tiff_that_is_turned_is_counted(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8))
    undo = {1: None, 3: Image.ROTATE_180, 6: Image.ROTATE_90}[orientation]
    pixels, traits = pixels_of(encoded(upright if undo is None else upright.transpose(undo), "TIFF", exif=exif))
    assert (pixels == np.asarray(upright)).all()
    assert traits == ((crop.TURNED,) if orientation != 1 else ())


# from the file to the network's input and back


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pixels_survive_the_whole_way(tmp_path, dtype):
    """png -> encode -> datamodule, as it reaches the network -> decode -> uint8."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = np.stack([ramp, ramp.T, 255 - ramp], -1)
    source = write_folder(tmp_path / "s", {f"k/{i}.png": encoded(Image.fromarray(colours)) for i in range(2)})
    run(source, tmp_path / "out", dtype=dtype, val_source=str(source), labels="none", val_labels="none")
    data = LatentDataModule(str(tmp_path / "out"), PixelAutoencoder(), batch_size=2)
    data.setup("fit")
    expected = torch.from_numpy(colours).permute(2, 0, 1).expand(2, -1, -1, -1)
    assert len(torch.unique(expected[:, 0])) == 256
    for split in ("train", "val"):
        pictures, _ = next(data.decoded_split(split, device=torch.device("cpu"), batch_size=2))
        assert pictures.dtype == torch.uint8
        assert torch.equal(pictures, expected)


# the destination


def test_a_whole_data_set_that_lost_a_file_is_not_whole(tmp_path):
    source = write_folder(tmp_path / "s", IMAGES)
    run(source, tmp_path / "out")
    (tmp_path / "out" / "train" / "00001.labels.npy").unlink()
    with pytest.raises(UserError, match=r"00001\.labels\.npy"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("content", ["[1]", "x{", ""])
def test_settings_that_another_program_wrote(tmp_path, content):
    source, out = write_folder(tmp_path / "s", IMAGES), write_folder(tmp_path / "out", {"encode.json": content.encode()})
    with pytest.raises(UserError, match=r"encode\.json', which holds no settings of this command.*Give another"):
        run(source, out)
    assert tree(out) == {"encode.json": content.encode()}


def test_a_seed_below_zero(tmp_path):
    with pytest.raises(UserError, match="--shuffle_seed=-1, expected at least 0"):
        run(write_folder(tmp_path / "s", IMAGES), tmp_path / "out", shuffle_seed=-1)


def test_an_interrupt_is_told_in_a_line(tmp_path):
    """Ctrl-C, then the same command again."""
    source = write_folder(tmp_path / "s", {f"{'ab'[i % 2]}/{i}.png": encoded(picture(i)) for i in range(3000)})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mf_lightning", "encode", source, out, "--autoencoder=pixel", "--image_size=32"]
    command += ["--shard_size=50", "--workers=1", "--device=cpu"]
    where = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **where)
    limit = time.monotonic() + 120
    while not list((out / ".encode").glob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert printed.endswith("interrupted: finished shards are kept, the same command goes on\n")
    assert not (out / "dataset.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **where)
    assert json.loads((out / "dataset.json").read_text())["splits"]["train"]["count"] == 3000
