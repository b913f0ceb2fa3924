"""Figures equal torch-fidelity's own on the same PNGs, whatever the batch size, and references are checked."""

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from mf_lightning.data.synthetic import seven_segment_digits
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.fidelity import SampleQuality, possible_metrics
from mf_lightning.metrics.protocol import NAMES
from mf_lightning.metrics.reference import compute_reference, load_reference, save_reference
from mf_lightning.pixels import from_uint8, to_uint8
from mf_lightning.sheet import tile, to_picture
from mf_lightning.types import UserError


def pictures(n: int, seed: int) -> torch.Tensor:
    """Return seven-segment digits with noise of the seed: random, but far from each other in every feature."""
    clean = torch.from_numpy(seven_segment_digits(np.arange(n) % 10, seed=seed, first=0))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return to_uint8(clean + 0.1 * seed * noise)


@pytest.fixture(scope="module")
def extractor():
    return Extractor("digits-cnn", class_layer="logits", score_layer="logits")


def scored(extractor, reference, images, labels=None, *, batches=None, metrics=None):
    """Return all figures that are possible of images, given in batches of numbers."""
    conditional = labels is not None
    chosen, _ = possible_metrics(metrics, extractor, reference, count=len(images), conditional=conditional, dinov2=None)
    quality = SampleQuality(chosen, len(images), extractor, reference)
    for index in [torch.arange(len(images))] if batches is None else batches:
        quality.update(images[index], None if labels is None else labels[index], index)
    return quality.compute()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of PNGs and the same pictures as tensors."""
    found = []
    for seed, n in ((1, 150), (2, 170)):
        folder = tmp_path_factory.mktemp(f"png{seed}")
        images = pictures(n, seed)
        for number, image in enumerate(images):
            to_picture(image).save(folder / f"{number:04d}.png")
        found.append((folder, images))
    return found


def test_figures_equal_calculate_metrics_on_the_same_pngs(folders, extractor):
    (folder1, generated), (folder2, real) = folders
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folder1), input2=str(folder2), cuda=False, fid=True, prc=True, kid=True, isc=True, kid_subset_size=150,
        feature_extractor="digits-cnn", verbose=False, cache=False, save_cpu_ram=True, samples_shuffle=True,
    )  # fmt: skip
    reference = compute_reference(extractor, real.split(64), source="test")
    mine = scored(extractor, reference, generated, batches=torch.arange(150).split(37))
    assert mine["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert mine["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert mine["recall"] == pytest.approx(theirs["recall"], rel=1e-6)
    assert mine["class_accuracy"] is None
    for name, their_name in (("kid", "kernel_inception_distance"), ("inception_score", "inception_score")):
        assert mine[name] == pytest.approx(theirs[f"{their_name}_mean"], rel=1e-6)
        assert mine[f"{name}_std"] == pytest.approx(theirs[f"{their_name}_std"], rel=1e-5)


def test_figures_do_not_depend_on_batches_or_their_order(folders, extractor):
    (_, generated), (_, real) = folders
    reference = compute_reference(extractor, [real], source="test")
    labels = torch.arange(150) % 10
    found = []
    for order, size in ((torch.arange(150), 150), (torch.arange(149, -1, -1), 7)):
        found.append(scored(extractor, reference, generated, labels, batches=order.split(size)))
    assert set(found[0]) == {*NAMES, "kid_std", "inception_score_std"}
    for key in ("fid", "kid", "inception_score", "precision", "recall", "class_accuracy"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5), key  # features move in the last digit with the batch
    assert 0 <= found[0]["class_accuracy"] <= 1
    same_images = [
        scored(extractor, reference, generated, labels, batches=parts)
        for parts in (torch.arange(150).split(50), torch.arange(150).split(50)[::-1])
    ]
    for key in ("fid", "kid", "inception_score", "precision", "recall", "class_accuracy"):
        assert same_images[0][key] == pytest.approx(same_images[1][key], rel=1e-9), key


def test_class_accuracy_counts_what_was_asked_for(extractor):
    from mf_lightning.data.sources import load_digits

    digits = load_digits()["val"]
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)
    reference = compute_reference(extractor, [images], source="test")
    right = scored(extractor, reference, images, labels)
    assert right["class_accuracy"] >= 0.98  # the shipped extractor on held-out digits
    assert scored(extractor, reference, images, (labels + 1) % 10)["class_accuracy"] < 0.02
    assert abs(right["fid"]) < 1e-3


def test_reference_there_and_back(tmp_path, extractor):
    reference = compute_reference(extractor, [pictures(40, 3)], source="test")
    save_reference(tmp_path / "r.npz", reference, reconstruction_fid=1.5)
    loaded = load_reference(tmp_path / "r.npz", extractor)
    assert np.array_equal(loaded.mu, reference.mu)
    assert np.array_equal(loaded.sigma, reference.sigma)
    assert torch.equal(loaded.features, reference.features)
    assert loaded.about["reconstruction_fid"] == 1.5
    assert loaded.name.startswith("r.npz@")


def test_reference_of_other_projects_has_no_features(tmp_path, extractor):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(96), sigma=np.eye(96))
    reference = load_reference(tmp_path / "adm.npz", extractor)
    figures = scored(extractor, reference, pictures(120, 4))
    assert figures["fid"] > 0
    assert figures["precision"] is figures["recall"] is figures["kid"] is None


def test_references_are_checked(tmp_path, extractor):
    with pytest.raises(UserError, match="no file"):
        load_reference(tmp_path / "absent.npz", extractor)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="2048 features, expected 96"):
        load_reference(tmp_path / "wide.npz", extractor)
    np.savez(tmp_path / "empty.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="expected mu and sigma"):
        load_reference(tmp_path / "empty.npz", extractor)
    (tmp_path / "text.npz").write_text("no npz")
    with pytest.raises(UserError, match="cannot be read"):
        load_reference(tmp_path / "text.npz", extractor)
    reference = compute_reference(Extractor("digits-cnn", layer="logits"), [pictures(40, 3)], source="test")
    save_reference(tmp_path / "logits.npz", reference)
    with pytest.raises(UserError, match="made with"):
        load_reference(tmp_path / "logits.npz", extractor)


def test_extractors_are_checked(tmp_path):
    with pytest.raises(UserError, match="expected one of inception-v3-compat"):
        Extractor("inception")
    with pytest.raises(UserError, match=r"layer '7' .* expected one of 96, logits"):
        Extractor("digits-cnn", layer="7")
    with pytest.raises(UserError, match="no file"):
        Extractor("inception-v3-compat", weights=str(tmp_path / "absent.pth"))
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(UserError, match="extractor_weights"):
        Extractor("inception-v3-compat", weights=str(tmp_path / "bad.pth"))
    with pytest.raises(UserError, match="uint8"):
        Extractor("digits-cnn").features(torch.zeros(2, 1, 32, 32))
    with pytest.raises(UserError, match="32, 32"):
        Extractor("digits-cnn").features(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


def test_all_uint8_values_there_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    x = torch.tensor([-9.0, -1.0, 1.0, 9.0, 0.0, (0.5 - 127.5) / 127.5])
    assert to_uint8(x).tolist() == [0, 0, 255, 255, 128, 1]  # clipped; halves go up


def test_grid_puts_pictures_in_rows():
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 4, 4)
    sheet = tile(images, columns=3, gap=1)
    assert sheet.shape == (1, 11, 16)
    assert sheet[0, 1, 1] == 0
    assert sheet[0, 6, 11] == 5
    assert sheet[0, 0, 0] == 128
    assert Image.fromarray(sheet[0].numpy()).size == (16, 11)
