"""`encode`: what it writes is what each image encodes to, the same bytes however often it is killed and however many help."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mf_lightning.__main__ import main
from mf_lightning.autoencoders import KLAutoencoder, PixelAutoencoder
from mf_lightning.cli import load
from mf_lightning.data.crop import center_crop
from mf_lightning.data.datamodule import LatentDataModule
from mf_lightning.data.shards import open_split, read_info, verify_checksums
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.reference import load_reference, reference_of_features
from mf_lightning.pixels import from_uint8, to_uint8
from mf_lightning.tools.encode import encode
from mf_lightning.tools.encode_out import EncodeOut
from mf_lightning.tools.encode_processes import Processes
from mf_lightning.types import UserError
from tests.runs import RECIPES, ROOT, lines, python
from tests.test_images import IMAGES, JPEG, encoded, picture, webdataset_files, write_folder, write_parquet, write_tar

SIZE = 16


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    """A small AutoencoderKL of random weights, saved as diffusers does."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    net = AutoencoderKL(block_out_channels=[4, 8], norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **blocks)
    folder = tmp_path_factory.mktemp("hub") / "small-vae"
    net.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """30 images in 3 classes, of several sizes."""
    files = {
        f"{name}/{i:02d}.png": encoded(picture(100 * k + i, 20 + i, 40 - i)) for k, name in enumerate("abc") for i in range(10)
    }
    return write_folder(tmp_path_factory.mktemp("photos"), files)


def run(source, out, autoencoder="pixel", **options) -> None:
    encode(str(source), str(out), autoencoder, **{"image_size": SIZE, "batch_size": 4, "shard_size": 7, **options})


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def stored(path: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    info = read_info(path)
    verify_checksums(path, info, split)
    shards = open_split(path, info, split)
    flipped = np.concatenate([s.latents_flip for s in shards]) if info.flip else None
    return np.concatenate([s.latents for s in shards]), np.concatenate([s.labels for s in shards]), flipped


def cropped(folder: Path, size: int = SIZE) -> torch.Tensor:
    pictures = [np.asarray(center_crop(Image.open(file), size)) for file in sorted(folder.rglob("*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


# what is written


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_moments_are_those_of_each_image(tmp_path, photos, vae, dtype, tolerance):
    run(photos, tmp_path / "out", vae, dtype=dtype, flip=True)
    model, info = KLAutoencoder(vae), read_info(tmp_path / "out")
    assert (info.kind, info.latent_shape, info.dtype, info.flip) == ("moments", (4, 8, 8), dtype, True)
    assert (info.autoencoder, info.scale, info.shift, info.image_size) == (model.id, 0.5, 0.0, SIZE)
    assert info.autoencoder.startswith("small-vae@")
    assert info.class_names == ("a", "b", "c")
    assert [s.count for s in info.splits["train"]] == [7, 7, 7, 7, 2]
    latents, labels, flipped = stored(tmp_path / "out")
    pixels = from_uint8(cropped(photos))
    assert abs(latents - model.encode(pixels).numpy()).max() < tolerance
    assert abs(flipped - model.encode(pixels.flip(-1)).numpy()).max() < tolerance
    assert labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert (latents[:, 4:] > 0).all()  # mean and std, not the logarithm of a variance
    assert not (tmp_path / "out" / ".encode").exists()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pixels_come_back_exactly(tmp_path, photos, dtype):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    folder = write_folder(tmp_path / "s", {"k/all.png": encoded(Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], -1)))})
    run(folder, tmp_path / "out", dtype=dtype, val_source=str(photos), val_labels="none", labels="none")
    info = read_info(tmp_path / "out")
    assert (info.kind, info.autoencoder, info.latent_shape) == ("latents", PixelAutoencoder.id, (3, 16, 16))
    back = to_uint8(torch.from_numpy(stored(tmp_path / "out")[0]))
    assert torch.equal(back, cropped(folder))
    assert len(np.unique(back[:, 0])) == 256
    assert torch.equal(to_uint8(torch.from_numpy(stored(tmp_path / "out", "val")[0])), cropped(photos))


@pytest.mark.parametrize(
    "make",
    [
        lambda tmp: write_folder(tmp / "s", IMAGES),
        lambda tmp: write_tar(tmp / "s.tar.gz", IMAGES, "w:gz"),
        lambda tmp: write_tar(tmp / "s.tar", webdataset_files(IMAGES)),
        lambda tmp: write_parquet(tmp / "s.parquet", IMAGES),
    ],
)
def test_every_kind_of_source_ends_in_the_same_latents(tmp_path, make):
    run(make(tmp_path), tmp_path / "out", workers=3)
    latents, labels, _ = stored(tmp_path / "out")
    assert torch.equal(to_uint8(torch.from_numpy(latents)), cropped(write_folder(tmp_path / "again", IMAGES)))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_validation_by_source_and_by_fraction(tmp_path, photos):
    few = write_folder(tmp_path / "val", {"c/x.png": encoded(picture(1)), "a/y.png": encoded(picture(2))})
    run(photos, tmp_path / "one", val_source=str(few))
    assert stored(tmp_path / "one", "val")[1].tolist() == [0, 2]  # as the training images number their classes
    run(photos, tmp_path / "two", val_fraction=0.2)
    whole = cropped(photos)
    train, val = (to_uint8(torch.from_numpy(stored(tmp_path / "two", split)[0])) for split in ("train", "val"))
    assert (len(train), len(val)) == (24, 6)
    seen = Counter(p.numpy().tobytes() for part in (train, val) for p in part)
    assert seen == Counter(p.numpy().tobytes() for p in whole)  # each in one split
    with pytest.raises(UserError, match=r"1 of which SOURCE does not have, the first is 'd'"):
        run(photos, tmp_path / "no", val_source=str(write_folder(tmp_path / "other", {"d/x.png": b""})))


def test_a_shuffled_order_mixes_classes(tmp_path, photos):
    run(photos, tmp_path / "out", shuffle_seed=3)
    latents, labels, _ = stored(tmp_path / "out")
    order = np.random.default_rng(3).permutation(30)
    assert torch.equal(to_uint8(torch.from_numpy(latents)), cropped(photos)[order])
    assert labels.tolist() == (order // 10).tolist()
    with pytest.raises(UserError, match="can only be read in order"):
        run(write_parquet(tmp_path / "s.parquet", IMAGES), tmp_path / "no", shuffle_seed=3)


def test_reference_statistics_are_those_of_the_cropped_images(tmp_path, photos):
    with_bad = {**tree(photos), "b/00x.png": b"broken"}
    source = write_folder(tmp_path / "s", with_bad)
    how = {"reference": True, "extractor": "digits-cnn", "unreadable": "skip", "val_source": str(photos)}
    with pytest.raises(UserError, match=r"expected uint8 of shape \(3, 32, 32\)"):
        run(source, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", image_size=32, **how)
    extractor = Extractor("digits-cnn")
    found = load_reference(tmp_path / "out" / "reference.npz", extractor)
    expected = reference_of_features(extractor.features(cropped(photos, 32))[extractor.layer], name="", about={})
    assert found.about == {"extractor": "digits-cnn", "layer": extractor.layer, "source": "s", "count": 30}
    assert torch.allclose(found.features, expected.features, atol=1e-5)
    assert np.allclose(found.mu, expected.mu, atol=1e-6)
    assert np.allclose(found.sigma, expected.sigma, atol=1e-6)


# killed, shared, started again


def options_of(vae, out, *more) -> list[str]:
    return [str(out), f"--autoencoder={vae}", "--image_size=32", "--batch_size=4", "--shard_size=6", "--flip=true",
            "--reference=true", "--extractor=digits-cnn", "--unreadable=skip", "--val_fraction=0.1", *more]  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """240 images, some of them broken, of which one shard holds nothing else."""
    files = {f"{'ab'[i % 2]}/{i:03d}.png": encoded(picture(i)) for i in range(240)}
    broken = {f"a/{i:03d}.png": b"broken" for i in range(0, 240, 30)}
    return write_folder(tmp_path_factory.mktemp("many"), {**files, **broken, **{f"b/000{i}.png": b"" for i in range(14)}})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, many, vae) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    main(["encode", str(many), *options_of(vae, out)])
    return tree(out)


def killed(many, vae, out: Path, records: int) -> None:
    """Start the command and kill it (SIGKILL) when it has finished so many shards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["nice", "-n", "19", sys.executable, "-m", "mf_lightning", "encode", str(many), *options_of(vae, out)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while len(list((out / ".encode").glob("*.json"))) < records:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)  # it stands still in the middle of something
    with pytest.raises(UserError, match="at which another job is working"):
        EncodeOut(out).begin(json.loads((out / "encode.json").read_text()))
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_started_again_it_writes_the_same_bytes(tmp_path, many, vae, unbroken, capsys):
    out = tmp_path / "out"
    killed(many, vae, out, records=5)
    assert not (out / "dataset.json").exists()
    done = {name: (out / name).stat().st_mtime_ns for name in tree(out) if name.endswith("latents.npy")}
    records = len(list((out / ".encode").glob("*.json")))
    (out / "train" / ".00000.latents.npy.1.tmp").write_bytes(b"left by a kill")
    capsys.readouterr()
    main(["encode", str(many), *options_of(vae, out)])
    assert tree(out) == unbroken
    printed = capsys.readouterr().out
    assert f"{records} of " in printed
    again = {name: (out / name).stat().st_mtime_ns for name in done}
    assert sum(again[name] == done[name] for name in done) >= records - 3  # finished ones were left alone
    main(["encode", str(many), *options_of(vae, out)])
    assert "is whole already" in capsys.readouterr().out
    assert tree(out) == unbroken


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, many, vae, unbroken):
    for records in (1, 9, 17, 30):
        killed(many, vae, tmp_path / "out", records)
    main(["encode", str(many), *options_of(vae, tmp_path / "out")])
    assert tree(tmp_path / "out") == unbroken


def test_two_processes_write_what_one_does(tmp_path, many, vae, unbroken):
    out = tmp_path / "out"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mf_lightning", "encode"]
    done = python(*torchrun, many, *options_of(vae, out, "--device=cpu"), env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert tree(out) == unbroken
    assert done.stdout.count("Wrote") == 1
    assert "254/254" in done.stderr  # the first process counts the images of both


def test_workers_and_attempts_may_differ_settings_not(tmp_path, photos, monkeypatch):
    out = tmp_path / "out"
    run(photos, out, workers=3)
    whole = tree(out)
    (out / "dataset.json").unlink()  # as if it had been killed
    for options, named in (
        ({"shard_size": 8}, "shard_size = 8 .* expected shard_size = 7"),
        ({"dtype": "float32"}, "dtype = 'float32'"),
        ({"flip": True}, "flip = True"),
        ({"shuffle_seed": 1}, "shuffle_seed = 1"),
        ({"val_fraction": 0.5}, r"val_fraction = 0\.5"),
    ):
        with pytest.raises(UserError, match=f"Got .*{named}.*, with which it was begun"):
            run(photos, out, **options)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.__version__", "9.9")
        with pytest.raises(UserError, match=r"versions = 'Pillow 9\.9"):
            run(photos, out)
    changed = write_folder(tmp_path / "changed", {**tree(photos), "a/99.png": encoded(picture(5))})
    with pytest.raises(UserError, match=r"images = \{'train': '31 images"):
        run(changed, out)
    run(photos, out, workers=1)
    assert tree(out) == whole


def test_a_damaged_shard_is_made_again(tmp_path, photos, monkeypatch):
    run(photos, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:  # killed when the shards are done
        patch.setattr(EncodeOut, "finish", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(photos, out)
    os.truncate(out / "train" / "00001.latents.npy", 100)
    (out / "train" / "00002.labels.npy").unlink()
    run(photos, out)
    assert tree(out) == tree(tmp_path / "whole")


def test_processes_without_an_address():
    with pytest.raises(UserError, match="WORLD_SIZE = 2 without MASTER_ADDR"):
        Processes({"WORLD_SIZE": "2", "RANK": "0"})
    with pytest.raises(UserError, match="expected auto, cpu or cuda"):
        Processes({}).device("tpu")


@pytest.mark.slow
def test_an_error_of_the_first_process_is_told_once(tmp_path, photos):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mf_lightning", "encode"]
    done = python(*torchrun, photos, tmp_path / "out", "--autoencoder=pixel", "--labels=nowhere.csv", "--device=cpu")
    assert done.returncode != 0
    assert done.stderr.count("error: Got --labels=nowhere.csv") == 1
    assert "Connection closed" not in done.stderr


# what cannot be read


BAD = {"a/cut.jpg": JPEG[:500], "a/empty.png": b"", "b/page.jpg": b"<html>", "c/né\n.png": b"\x89PNG"}


def test_unreadable_images_are_listed_and_the_counts_add_up(tmp_path, photos, capsys):
    odd = {"c/small.png": encoded(picture(1, 5, 5)), "c/clear.png": encoded(Image.new("RGBA", (20, 20)))}
    source = write_folder(tmp_path / "s", {**tree(photos), **BAD, **odd})
    run(source, tmp_path / "out", unreadable="skip")
    listed = lines(tmp_path / "out" / "unreadable.jsonl")
    assert {line["name"] for line in listed} == set(BAD)
    assert all(line["reason"] and line["split"] == "train" for line in listed)
    names = sorted({**tree(photos), **BAD, **odd})
    assert [names[line["sample"]] for line in listed] == [line["name"] for line in listed]
    printed = capsys.readouterr().out
    assert "train: 36 images = 32 encoded + 4 unreadable" in printed
    assert "1 smaller than the crop, enlarged" in printed
    assert "1 with transparency, laid on white" in printed
    latents, labels, _ = stored(tmp_path / "out")
    assert np.bincount(labels).tolist() == [10, 10, 12]
    whole, _, _ = (run(photos, tmp_path / "plain"), None, None) and stored(tmp_path / "plain")
    assert np.array_equal(latents[:20], whole[:20])  # others are where they were


def test_stopping_is_the_default_and_skipping_may_come_later(tmp_path, photos):
    source, out = write_folder(tmp_path / "s", {**tree(photos), "b/03x.png": JPEG[:500]}), tmp_path / "out"
    with pytest.raises(UserError, match=r"'b/03x.png', which cannot be read \(OSError: (?i:.*truncated.*)--unreadable=skip"):
        run(source, out)
    assert not (out / "dataset.json").exists()
    run(source, tmp_path / "skipped", unreadable="skip")
    run(source, out, unreadable="skip")
    assert tree(out) == tree(tmp_path / "skipped")


def test_skipped_images_are_not_accepted_by_a_later_stop(tmp_path, photos, monkeypatch):
    source, out = write_folder(tmp_path / "s", {**tree(photos), "b/03x.png": b""}), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(EncodeOut, "finish", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(source, out, unreadable="skip")
    with pytest.raises(UserError, match=r"1 image\(s\) that an earlier attempt could not read \(the first is 'b/03x.png'"):
        run(source, out)


def test_not_one_image_can_be_read(tmp_path):
    with pytest.raises(UserError, match="not one readable image of 4 in the split 'train'"):
        run(write_folder(tmp_path / "s", BAD), tmp_path / "out", unreadable="skip")


def test_a_disk_that_fails_is_not_a_broken_image(tmp_path, photos, monkeypatch):
    from mf_lightning.data.images.folder import FolderSource

    def fails(self, number):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FolderSource, "read", fails)
    with pytest.raises(UserError, match=r"'a/00.png', which the disk or network does not give .*Input/output error"):
        run(photos, tmp_path / "out", unreadable="skip")


# what is refused, and what stays as it was


def test_one_class_is_a_warning(tmp_path, capsys):
    run(write_folder(tmp_path / "s", {"k/0.png": encoded(picture(0))}), tmp_path / "out")
    assert "warning: all images are of one class" in capsys.readouterr().out
    assert read_info(tmp_path / "out").class_names == ("k",)


def test_destinations_that_hold_something(tmp_path, photos):
    run(photos, tmp_path / "one")
    before = tree(tmp_path / "one")
    with pytest.raises(UserError, match="shard_size = 3"):
        run(photos, tmp_path / "one", shard_size=3)
    (tmp_path / "one" / "encode.json").rename(tmp_path / "kept.json")  # another command's data set
    with pytest.raises(UserError, match="which holds another data set"):
        run(photos, tmp_path / "one")
    (tmp_path / "kept.json").rename(tmp_path / "one" / "encode.json")
    assert tree(tmp_path / "one") == before
    other = write_folder(tmp_path / "other", {"thesis.txt": b"x"})
    with pytest.raises(UserError, match=r"which holds 'thesis.txt', expected a new or empty folder"):
        run(photos, other)
    assert tree(other) == {"thesis.txt": b"x"}
    with pytest.raises(UserError, match="which is a file"):
        run(photos, other / "thesis.txt")


def test_a_full_disk_keeps_what_is_done(tmp_path, photos, vae, capsys):
    """No file grows beyond 1 kB, then the same command with room for it."""
    out = tmp_path / "out"
    run(photos, tmp_path / "whole", dtype="float32")
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(UserError, match=r"could not be written \(File too large\).*finished shards are kept"):
            run(photos, out, dtype="float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(out.rglob("*.tmp"))
    assert not (out / "dataset.json").exists()
    run(photos, out, dtype="float32")
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 15, "autoencoder": "VAE"}, "one latent of 2 x 2 pixels, expected a multiple of 2. Give 16"),
        ({"image_size": 0}, "--image_size=0"),
        ({"batch_size": 0}, "--batch_size=0"),
        ({"shard_size": -1}, "--shard_size=-1"),
        ({"workers": -1}, "--workers=-1"),
        ({"val_fraction": 1.0}, r"--val_fraction=1\.0"),
        ({"val_fraction": 0.001}, "leaves 0 for validation"),
        ({"val_fraction": 0.1, "val_source": "x"}, "Got --val_source and --val_fraction"),
        ({"val_labels": "x"}, "Got --val_labels without --val_source"),
        ({"extractor": "digits-cnn"}, "without --reference=true"),
        ({"reference": True, "extractor": "none"}, "Got the feature extractor 'none'"),
        ({"dtype": "int8"}, "--dtype=int8"),
        ({"autoencoder": "/nowhere/vae"}, "no directory here"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, photos, vae, options, message):
    name = {"VAE": vae}.get(options.get("autoencoder"), options.get("autoencoder", "pixel"))
    with pytest.raises(UserError, match=message):
        run(photos, tmp_path / "out", **{**options, "autoencoder": name})
    assert not (tmp_path / "out").exists()


def test_values_that_float16_cannot_hold(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(PixelAutoencoder, "encode", lambda self, pixels: pixels * 1e6)
    with pytest.raises(UserError, match=r"image 'a/00.png' that are not finite in float16.*--dtype=float32"):
        run(photos, tmp_path / "out")


def test_a_missing_hub_names_the_local_folder(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stop:
        main(["encode", str(photos), str(tmp_path / "out")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "Got the autoencoder 'stabilityai/sd-vae-ft-mse'" in message
    assert "offline mode" in message
    assert "--autoencoder=/path/to/folder" in message
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_whose_folder_is_damaged(tmp_path, photos, vae):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    os.truncate(next(folder.glob("*.safetensors")), 2000)
    with pytest.raises(UserError, match=r"could not be loaded \(.*header.*--autoencoder=/path/to/folder"):
        run(photos, tmp_path / "out", str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"could not be loaded \(Error no file named config.json"):
        run(photos, tmp_path / "out", str(folder))


def test_training_on_the_result(tmp_path, photos, vae):
    run(photos, tmp_path / "latents", vae, val_fraction=0.2, flip=True)
    data = LatentDataModule(str(tmp_path / "latents"), KLAutoencoder(vae), checksums=True)
    data.setup("test")
    pictures, _ = next(data.decoded_split("val", device=torch.device("cpu"), batch_size=6))
    assert pictures.shape == (6, 3, SIZE, SIZE)
    cli = load([
        f"--config={RECIPES / 'quickstart.yaml'}", f"--data.init_args.path={tmp_path / 'latents'}",
        "--data.init_args.autoencoder=null", "--data.init_args.batch_size=8", f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.lr_schedule.init_args.warmup_steps=1",
        "--trainer.log_every_n_steps=1", "--sample_eval.num_samples=0", "--sample_grid.rows=0", "--self_check.enabled=false",
        "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 2
    assert "train/raw_error" in (tmp_path / "run" / "metrics.csv").read_text()
    assert json.loads((tmp_path / "latents" / "encode.json").read_text())["autoencoder"] == KLAutoencoder(vae).id
