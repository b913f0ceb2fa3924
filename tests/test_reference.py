"""References: files as other projects write them, and `mf_lightning reference` from every kind of source."""

from __future__ import annotations

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
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_input_id_to_statistics
from torch_fidelity.utils import create_feature_extractor

from mf_lightning.__main__ import main
from mf_lightning.autoencoders import PixelAutoencoder
from mf_lightning.data.crop import center_crop
from mf_lightning.data.shards import DatasetInfo, write_info, write_shard
from mf_lightning.data.synthetic import seven_segment_digits
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.image_npz import ImageNpz
from mf_lightning.metrics.kept import KeptFeatures
from mf_lightning.metrics.reference import compute_reference, load_reference
from mf_lightning.pixels import from_uint8, to_uint8
from mf_lightning.tools.reference import reference
from mf_lightning.types import UserError
from tests.parity.inception import seeded_inception_weights
from tests.runs import ROOT, python

COUNT = 130


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor("digits-cnn")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """130 seven-segment digits with noise, (N, 1, 32, 32) uint8."""
    clean = torch.from_numpy(seven_segment_digits(np.arange(COUNT) % 10, seed=1, first=0))
    return to_uint8(clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images) -> Path:
    """The same as PNGs."""
    path = tmp_path_factory.mktemp("png")
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(path / f"{number:04d}.png")
    return path


@pytest.fixture(scope="module")
def features(extractor, images) -> torch.Tensor:
    return extractor.features(images)[extractor.layer]


@pytest.fixture(scope="module")
def expected(features) -> dict[str, np.ndarray]:
    """numpy's mean and covariance, as every project computes them."""
    rows = features.double().numpy()
    return {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)}


def nhwc(images: torch.Tensor) -> np.ndarray:
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def run(source: object, out: Path, **options) -> None:
    reference(str(source), str(out), **{"extractor": "digits-cnn", "device": "cpu", "batch_size": 32, "workers": 1, **options})


def assert_close(found, expected, bound: float = 1e-10) -> None:
    assert np.abs(found.mu - expected["mu"]).max() < bound
    assert np.abs(found.sigma - expected["sigma"]).max() < bound


# files of other projects


def spatial(seed: int = 0) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(40, 2023))
    return {"mu_s": rows.mean(axis=0), "sigma_s": np.cov(rows, rowvar=False)}


def as_adm(file, e, images):
    np.savez(file, arr_0=nhwc(images), **e, **spatial())


def as_pytorch_fid(file, e, images):
    np.savez_compressed(file, **e)


def as_torch_fidelity(file, e, images):
    np.savez(file, **{key: value.astype(np.float32) for key, value in e.items()})


def as_jit(file, e, images):
    np.savez(file, mu=e["mu"], sigma=e["sigma"])


def as_meanflow(file, e, images):
    np.savez(file, ref_mu=e["mu"], ref_sigma=e["sigma"])


@pytest.mark.parametrize("write", [as_adm, as_pytorch_fid, as_torch_fidelity, as_jit, as_meanflow])
def test_files_of_other_projects_are_read(tmp_path, extractor, images, expected, features, write):
    file = tmp_path / "theirs.npz"
    write(file, expected, images)
    found = load_reference(file, extractor)
    assert_close(found, expected, 1e-6 if write is as_torch_fidelity else 1e-15)
    assert found.mu.dtype == found.sigma.dtype == np.float64
    assert found.name.startswith("theirs.npz@")
    assert found.has_features == (write is as_adm)
    if write is as_adm:
        assert np.array_equal(found.spatial.mu, spatial()["mu_s"])
        assert torch.allclose(found.features, features, atol=1e-6)
    else:
        assert found.features is None
        assert found.spatial is None


def test_features_of_a_files_images_are_computed_once_and_only_when_asked_for(
    tmp_path, extractor, images, expected, monkeypatch
):
    file = tmp_path / "adm.npz"
    as_adm(file, expected, images)
    calls = []
    plain = extractor.features
    monkeypatch.setattr(extractor, "features", lambda batch: calls.append(len(batch)) or plain(batch))
    found = [load_reference(file, extractor, cache=tmp_path / "run") for _ in range(2)]
    assert not calls
    assert found[0].has_features
    assert not calls
    one, other = found[0].features, found[1].features
    assert calls == [64, 64, 2]
    assert torch.equal(one, other)
    assert len(list((tmp_path / "run").glob("reference-*-features.npy"))) == 1
    np.savez(file, arr_0=nhwc(255 - images), **expected)  # another file of that name
    assert not torch.equal(load_reference(file, extractor, cache=tmp_path / "run").features, one)


def test_references_that_do_not_fit_are_refused(tmp_path, extractor, images, expected):
    def refused(match: str, **arrays) -> None:
        np.savez(tmp_path / "r.npz", **arrays)
        with pytest.raises(UserError, match=match):
            load_reference(tmp_path / "r.npz", extractor)

    mu, sigma = expected["mu"], expected["sigma"]
    refused("with 2048 features, expected 96 of 'digits-cnn'", mu=np.zeros(2048), sigma=np.eye(2048))
    refused("with 2048 features, expected 96", ref_mu=np.zeros(2048), ref_sigma=np.eye(2048))
    refused(r"mu of shape \(96,\) and sigma of shape \(2, 2\)", mu=mu, sigma=np.eye(2))
    refused("not finite", mu=mu * np.nan, sigma=sigma)
    refused("with 5 features, expected 2023 of sFID", mu=mu, sigma=sigma, mu_s=np.zeros(5), sigma_s=np.eye(5))
    refused(r"features of shape \(3, 7\)", mu=mu, sigma=sigma, features=np.zeros((3, 7), np.float32))
    refused(r"mf_lightning reference .*r.npz OUT.npz", arr_0=nhwc(images))
    refused("expected uint8 images", mu=mu, sigma=sigma, arr_0=np.zeros((2, 8, 8, 3)))
    refused("made with .*other", mu=mu, sigma=sigma, about=json.dumps({"extractor": "other", "layer": "96"}))
    refused("made with .*weights", mu=mu, sigma=sigma, about=json.dumps({"weights": "0123456789abcdef"}))
    refused("cannot be read", mu=mu, sigma=sigma, about="no JSON")
    refused("cannot be read", mu=np.array([{}], object), sigma=sigma)
    whole = (tmp_path / "r.npz").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cannot be read"):
            load_reference(tmp_path / "cut.npz", extractor)


# images in an .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_npz_are_read_in_blocks(tmp_path, save):
    values = np.random.default_rng(0).integers(0, 256, (23, 6, 5, 3), np.uint8)
    save(tmp_path / "a.npz", arr_1=np.arange(23), arr_0=values)
    npz = ImageNpz(tmp_path / "a.npz")
    assert len(npz) == 23
    for first, last in ((0, None), (7, 20), (22, 23), (23, 23)):
        blocks = list(npz.batches(4, first, last))
        assert all(len(block) <= 4 for block in blocks)
        joined = torch.cat([torch.empty(0, 3, 6, 5, dtype=torch.uint8), *blocks])
        assert np.array_equal(joined.permute(0, 2, 3, 1).numpy(), values[first:last])


def test_damaged_images_of_an_npz_are_named(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", arr_0=values)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a.npz', which is damaged"):
        list(ImageNpz(tmp_path / "a.npz").batches(8))


# features that are kept


def test_a_choice_of_features_depends_on_numbers_only():
    rows = torch.arange(500, dtype=torch.float32)[:, None].expand(-1, 2)
    found = []
    for order in (torch.arange(500).split(500), torch.randperm(500, generator=torch.Generator().manual_seed(0)).split(7)):
        kept = KeptFeatures(2, 40)
        for index in order:
            kept.add(index, rows[index])
        found.append(kept.sorted())
    assert torch.equal(found[0], found[1])
    assert len(found[0]) == 40
    chosen = found[0][:, 0]
    assert (chosen.diff() > 0).all()
    assert 150 < chosen.mean() < 350  # spread over all
    other = KeptFeatures(2, 40, seed=1)
    other.add(torch.arange(500), rows)
    assert not torch.equal(other.sorted(), found[0])
    everything = KeptFeatures(2, 600)
    everything.add(torch.arange(500), rows)
    assert torch.equal(everything.sorted(), rows)


# the command


def test_folder_zip_and_npz_give_torch_fidelitys_statistics(tmp_path, folder, images, extractor, expected, features, capsys):
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    np.savez_compressed(tmp_path / "batch.npz", arr_0=nhwc(images), arr_1=np.zeros(COUNT, np.int64))
    layer = [extractor.layer]
    theirs = fid_input_id_to_statistics(
        1, create_feature_extractor("digits-cnn", layer, cuda=False, verbose=False), layer[0], input1=str(folder), cuda=False,
        batch_size=64, save_cpu_ram=True, verbose=False, cache=False,
    )  # fmt: skip
    for name in (folder, tmp_path / "pack.zip", tmp_path / "batch.npz"):
        run(name, tmp_path / "out.npz", overwrite=True)
        found = load_reference(tmp_path / "out.npz", extractor)
        assert_close(found, expected)
        assert_close(found, theirs, 1e-6 * np.abs(theirs["sigma"]).max())
        assert torch.allclose(found.features, features, atol=1e-6)
        assert found.about["count"] == COUNT
        assert f"of {COUNT} images under digits-cnn" in capsys.readouterr().out


def test_latents_are_decoded(tmp_path, images, extractor, expected):
    pixels = from_uint8(images).numpy()
    shards = [write_shard(tmp_path / "set", "train", n, latents=pixels[s], labels=np.zeros(len(pixels[s])))
              for n, s in enumerate((slice(0, 50), slice(50, None)))]  # fmt: skip
    val = write_shard(tmp_path / "set", "val", 0, latents=pixels[:60], labels=np.zeros(60))
    splits = {"train": tuple(shards), "val": (val,)}
    write_info(
        tmp_path / "set", DatasetInfo("latents", (1, 32, 32), "float32", False, PixelAutoencoder.id, 1, 0, 32, (), splits)
    )
    run(tmp_path / "set", tmp_path / "out.npz")
    found = load_reference(tmp_path / "out.npz", extractor)
    assert_close(found, expected)
    run(tmp_path / "set", tmp_path / "val.npz", split="val", autoencoder="pixel")
    assert load_reference(tmp_path / "val.npz", extractor).about["count"] == 60
    with pytest.raises(UserError, match="Got --split=test"):
        run(tmp_path / "set", tmp_path / "x.npz", split="test")
    with pytest.raises(UserError, match="Got --image_size=16"):
        run(tmp_path / "set", tmp_path / "x.npz", image_size=16)
    with pytest.raises(UserError, match="autoencoder"):
        run(tmp_path / "set", tmp_path / "x.npz", autoencoder="mf_lightning:digits/autoencoder")


def test_statistics_beside_images_serve_fid_and_the_images_the_rest(tmp_path, images, extractor, features):
    known = {"mu": np.ones(96), "sigma": 2 * np.eye(96)}
    np.savez(tmp_path / "adm.npz", arr_0=nhwc(images), **known, **spatial())
    run(tmp_path / "adm.npz", tmp_path / "out.npz", max_features=20)
    found = load_reference(tmp_path / "out.npz", extractor)
    assert_close(found, known)
    assert np.array_equal(found.spatial.sigma, spatial()["sigma_s"])
    assert found.features.shape == (20, 96)
    apart = (found.features[:, None] - features[None]).abs().sum(-1).min(dim=1).values
    assert apart.max() < 1e-4
    assert found.about["kept"] == 20
    assert "adm.npz@" in found.about["statistics"]


def test_inceptions_reference_holds_sfids_statistics(tmp_path, folder):
    torch.save(seeded_inception_weights(3), tmp_path / "inception.pth")
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(folder.iterdir())[:4]:
        shutil.copy(file, few)
    run(few, tmp_path / "out.npz", extractor="inception-v3-compat", weights=str(tmp_path / "inception.pth"), max_features=0)
    mine = Extractor("inception-v3-compat", weights=str(tmp_path / "inception.pth"), spatial=True)
    found = load_reference(tmp_path / "out.npz", mine)
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(f)))[None] for f in sorted(few.iterdir())])
    expected = mine.features(pictures)
    assert_close(found.spatial, fid_features_to_statistics(expected["spatial"]), 1e-5 * found.spatial.sigma.max())
    assert_close(found, fid_features_to_statistics(expected["2048"]), 1e-5 * found.sigma.max())
    assert not found.has_features


def test_pictures_are_cropped_or_all_of_one_size(tmp_path, extractor):
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        size = (40 + number, 50, 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / f"{number}.png")
    with pytest.raises(UserError, match=r"'1.png' of 41 x 50 pixels and '0.png' of 40 x 50.*--image_size"):
        _uncropped(folder)
    run(folder, tmp_path / "out.npz", image_size=32)
    cropped = [np.asarray(center_crop(Image.open(file), 32)) for file in sorted(folder.iterdir())]
    expected = compute_reference(extractor, [torch.from_numpy(np.stack(cropped)).permute(0, 3, 1, 2)], source="test")
    assert_close(load_reference(tmp_path / "out.npz", extractor), {"mu": expected.mu, "sigma": expected.sigma})


def _uncropped(folder: Path) -> None:
    from mf_lightning.tools.pictures import open_pictures

    pictures = open_pictures(str(folder), split=None, autoencoder=None, image_size=None, follow_links=False)
    assert pictures.shape == (3, 40, 50)
    list(pictures.batches(0, 6, size=6, device=torch.device("cpu"), workers=0))


def test_mistakes_are_refused_before_anything_is_computed(tmp_path, folder, capsys, monkeypatch):
    def message(*options: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["reference", *map(str, options)])
        assert stop.value.code == 2
        return capsys.readouterr().err

    out, digits = tmp_path / "out.npz", "--extractor=digits-cnn"
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3", "http://127.0.0.1:9/weights.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert "Give a local file as --weights" in message(folder, out)
    assert "which is no file" in message(folder, out, digits, f"--weights={tmp_path / 'absent.pth'}")
    assert "--dinov2_weights without --dinov2" in message(folder, out, digits, "--dinov2_weights=x.pth")
    assert "expected a name that ends in .npz" in message(folder, tmp_path / "out.pt", digits)
    assert "which does not exist" in message(tmp_path / "nowhere", out, digits)
    assert "expected them for a data set of latents" in message(folder, out, digits, "--split=val")
    assert "shape (3, 32, 32)" in message(folder, out, digits, "--image_size=16")
    assert "--max_features=-1" in message(folder, out, digits, "--max_features=-1")
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((3, 32, 32, 3), np.uint8), mu=np.zeros(2048), sigma=np.eye(2048))
    assert "2048 features, expected 96" in message(tmp_path / "wide.npz", out, digits)
    np.savez(tmp_path / "mu.npz", mu=np.zeros(96), sigma=np.eye(96))
    assert "arr_0" in message(tmp_path / "mu.npz", out, digits)
    assert not out.exists()
    out.write_text("kept")
    assert "--overwrite=true" in message(folder, out, digits)
    assert out.read_text() == "kept"


def test_an_image_that_cannot_be_read_is_named(tmp_path, folder):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    (copied / "0100.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"'0100\.png', which cannot be read"):
        run(copied, tmp_path / "out.npz")
    assert not list(tmp_path.glob("*.npz"))


def test_two_processes_give_the_reference_of_one(tmp_path, folder, extractor):
    run(folder, tmp_path / "one.npz", max_features=50)
    result = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mf_lightning", "reference", folder,
        tmp_path / "two.npz", "--extractor=digits-cnn", "--device=cpu", "--batch_size=32", "--max_features=50",
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = (load_reference(tmp_path / name, extractor) for name in ("one.npz", "two.npz"))
    assert_close(one, {"mu": two.mu, "sigma": two.sigma}, 1e-6)  # batches differ, and float32 features in their last digit
    assert one.about == two.about
    assert torch.allclose(one.features, two.features, atol=1e-6)


def test_killed_half_way_it_leaves_no_file(tmp_path, folder):
    slow = (
        "import sys, time; from mf_lightning.metrics.extractor import Extractor; plain = Extractor.features\n"
        "def features(self, images):\n"
        "    print('batch', flush=True); time.sleep(0.3 if len(images) > 4 else 0); return plain(self, images)\n"
        "Extractor.features = features\n"
        "from mf_lightning.__main__ import main; main(sys.argv[1:])"
    )
    command = [
        sys.executable,
        "-c",
        slow,
        "reference",
        folder,
        tmp_path / "out.npz",
        "--extractor=digits-cnn",
        "--batch_size=8",
    ]
    process = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    for _ in range(6):
        assert process.stdout.readline() == "batch\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.iterdir()) == []
