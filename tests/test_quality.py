"""Figures by sums and blocks: parity with torch-fidelity under Inception and DINOv2, over processes, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch.nn import functional as F

from mf_lightning.metrics import dinov2
from mf_lightning.metrics.extractor import SPATIAL, Extractor
from mf_lightning.metrics.fidelity import SampleQuality, possible_metrics
from mf_lightning.metrics.neighbours import precision_recall
from mf_lightning.metrics.protocol import protocol_id
from mf_lightning.metrics.reference import Reference, Statistics
from mf_lightning.metrics.score import ScoreSums
from mf_lightning.metrics.store import FeatureStore
from mf_lightning.metrics.sums import FeatureSums
from mf_lightning.sheet import to_picture
from mf_lightning.types import UserError
from tests.parity.inception import seeded_inception_weights
from tests.test_metrics import pictures


def drawn(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def stored(features: torch.Tensor) -> FeatureStore:
    store = FeatureStore(*features.shape)
    for index in torch.randperm(len(features)).split(700):
        store.add(index, features[index])
    return store


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("inception") / "seeded.pth"
    torch.save(seeded_inception_weights(3), file)
    return str(file)


def test_sums_are_numpys_mean_and_covariance_far_from_zero():
    features = 1000 + drawn(2500, 20, seed=0)
    for centre in (None, np.full(20, 999.0)):
        sums = FeatureSums(20, centre=centre)
        for part in features.split(300):
            sums.update(part)
        mu, sigma = sums.statistics()
        exact = features.double().numpy()
        assert np.allclose(mu, exact.mean(axis=0), rtol=1e-13)
        assert np.allclose(sigma, np.cov(exact, rowvar=False), rtol=0, atol=1e-12)


def test_neighbours_equal_torch_fidelity_whatever_the_blocks():
    generated, real = drawn(2300, 12, seed=1) * 0.9, drawn(1700, 12, seed=2)
    theirs = torch_fidelity.metric_prc.prc_features_to_metric(generated, real, save_cpu_ram=True, verbose=False)
    precision, recall = precision_recall(stored(generated), real)
    assert precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert recall == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0.1 < recall < precision < 0.99  # neither is trivial


def test_score_sums_equal_torch_fidelity_with_uneven_splits():
    logits = 2 * drawn(257, 30, seed=3)
    theirs = torch_fidelity.metric_isc.isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    sums = ScoreSums(257, 30)
    for index in torch.randperm(257).split(50):
        sums.update(index, logits[index])
    mean, std = sums.compute()
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_spatial_features_are_the_first_seven_channels_of_the_third_17x17_block(inception_weights):
    extractor = Extractor("inception-v3-compat", weights=inception_weights, spatial=True)
    images = pictures(3, seed=1)
    found = extractor.features(images)[SPATIAL]
    net, seen = extractor.net, {}
    net.Mixed_6c.register_forward_hook(lambda module, inputs, output: seen.update(into=output))
    extractor.features(images)
    conv = net.Mixed_6d.branch1x1  # by hand: convolution, batch norm as an affine map, ReLU
    weight = conv.bn.weight / torch.sqrt(conv.bn.running_var + conv.bn.eps)
    by_hand = F.conv2d(seen["into"], conv.conv.weight) * weight[:, None, None]
    by_hand = F.relu(by_hand + (conv.bn.bias - conv.bn.running_mean * weight)[:, None, None])
    assert found.shape == (3, 17 * 17 * 7)
    expected = np.moveaxis(by_hand[:, :7].numpy(), 1, -1).reshape(3, -1)  # NHWC, as TensorFlow flattens it
    assert np.abs(found.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_sfid_is_the_frechet_distance_that_numpy_computes(inception_weights, monkeypatch):
    extractor = Extractor("inception-v3-compat", weights=inception_weights, layer="64", spatial=True)
    full = extractor.features
    monkeypatch.setattr(extractor, "features", lambda x: {k: v[:, ::150] if k == SPATIAL else v for k, v in full(x).items()})
    real, generated = (extractor.features(pictures(n, seed)) for n, seed in ((26, 1), (24, 2)))
    a, b = (found[SPATIAL].double().numpy() for found in (generated, real))
    mu, sigma = b.mean(axis=0), np.cov(b, rowvar=False)
    zeros = np.zeros(64)
    reference = Reference(zeros, np.eye(64), None, "test", {}, spatial=Statistics(mu, sigma))
    quality = SampleQuality(["sfid"], 24, extractor, reference)
    for index in torch.arange(24).split(13):
        quality.update(pictures(24, 2)[index], None, index)
    values, vectors = np.linalg.eigh(sigma)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ np.cov(a, rowvar=False) @ root).clip(0)).sum()
    expected = ((a.mean(axis=0) - mu) ** 2).sum() + np.trace(np.cov(a, rowvar=False)) + np.trace(sigma) - 2 * trace
    assert quality.compute()["sfid"] == pytest.approx(expected, rel=1e-5)


def test_inception_figures_equal_calculate_metrics(inception_weights, tmp_path):
    folders = []
    for seed, n in ((1, 24), (6, 26)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        images = pictures(n, seed)
        for number, image in enumerate(images):
            to_picture(image).convert("RGB").save(folder / f"{number:03d}.png")
        folders.append((str(folder), images))
    (one, generated), (two, real) = folders
    theirs = torch_fidelity.calculate_metrics(
        input1=one, input2=two, cuda=False, fid=True, kid=True, isc=True, prc=True, kid_subset_size=24, samples_shuffle=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=inception_weights, feature_layer_fid="192",
        feature_layer_kid="192", feature_layer_prc="192", verbose=False, cache=False, save_cpu_ram=True, batch_size=13,
    )  # fmt: skip
    extractor = Extractor("inception-v3-compat", weights=inception_weights, layer="192", score_layer="logits_unbiased")
    features = torch.cat([extractor.features(part)["192"] for part in real.split(13)])
    reference = Reference(features.double().mean(0).numpy(), np.cov(features.double().numpy(), rowvar=False), features, "t", {})
    chosen, off = possible_metrics(None, extractor, reference, count=24, conditional=False, dinov2=None)
    assert set(off) == {"sfid", "fd_dinov2", "class_accuracy"}
    quality = SampleQuality(chosen, 24, extractor, reference)
    for index in torch.arange(24).split(13):
        quality.update(generated[index], None, index)
    mine = quality.compute()
    assert mine["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert mine["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert mine["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert (mine["precision"], mine["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_dinov2_from_a_file_gives_torch_fidelitys_features(tmp_path, monkeypatch):
    """The network is timm's; resize, normalisation and token are torch-fidelity's, which is given the same network here."""
    import timm

    published = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=518, num_classes=0).state_dict()
    generator = torch.Generator().manual_seed(0)
    published = {key: 0.05 * torch.randn(value.shape, generator=generator) for key, value in published.items()}
    torch.save({**published, "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14_pretrain.pth")
    ours = Extractor(
        "dinov2-vit-s-14", weights=str(tmp_path / "dinov2_vits14_pretrain.pth"), option="sample_eval.dinov2_weights"
    )
    monkeypatch.setattr(torch.hub, "load", lambda repository, name: dinov2.build("dinov2-vit-s-14", published))
    theirs = torch_fidelity.feature_extractor_dinov2.FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    images = pictures(2, 1).expand(-1, 3, -1, -1)
    assert torch.equal(ours.features(images)["dinov2"], theirs(images)[0])
    assert ours.dim == 384
    path = str(tmp_path / "dinov2_vits14_pretrain.pth")
    with pytest.raises(UserError, match=r"sample_eval\.dinov2_weights"):
        Extractor("dinov2-vit-b-14", weights=path, option="sample_eval.dinov2_weights")


def test_position_embeddings_are_resized_as_dinov2_does():
    """A linear ramp stays one away from the border; the factor (16 + 0.1) / 37 shifts it by what the offset says."""
    ramp = torch.arange(37.0).expand(37, 37).reshape(1, 37 * 37, 1)
    resized = dinov2.resized_positions(torch.cat([torch.full((1, 1, 1), 7.0), ramp], dim=1))
    assert resized.shape == (1, 257, 1)
    assert resized[0, 0, 0] == 7
    column = torch.arange(16)
    expected = (column + 0.5) * 37 / 16.1 - 0.5
    found = resized[0, 1:, 0].reshape(16, 16)
    assert torch.allclose(found[8, 1:-1], expected[1:-1], atol=6e-2)
    same = torch.rand(1, 257, 3)
    assert dinov2.resized_positions(same) is same


def test_a_fd_on_dinov2_features_is_computed(tmp_path):
    class Halves:
        layer, dim, spatial = "dinov2", 3, False
        name = "dinov2-vit-s-14"

        def features(self, images):
            return {"dinov2": images.float().flatten(1)[:, :3]}

    images = torch.randint(0, 256, (50, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = images.double().flatten(1)[:, :3].numpy()
    statistics = Statistics(features.mean(0) + 1, np.cov(features, rowvar=False))
    extractor = Extractor("digits-cnn")
    reference = Reference(np.zeros(96), np.eye(96), None, "test", {}, dinov2=statistics)
    chosen, _ = possible_metrics(["fd_dinov2"], extractor, reference, count=50, conditional=False, dinov2=Halves())
    quality = SampleQuality(chosen, 50, extractor, reference, dinov2=Halves())
    quality.update(images, None, torch.arange(50))
    assert quality.compute()["fd_dinov2"] == pytest.approx(3.0, rel=1e-6)  # three means, one apart


def test_two_processes_give_the_figures_of_one(tmp_path):
    code = (
        "import sys, json, torch; from tests.test_quality import figures_of_this_process as f\n"
        "rank, world, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]\n"
        "how = dict(init_method=f'file://{out}.meet', rank=rank, world_size=world)\n"
        "if world > 1: torch.distributed.init_process_group('gloo', **how)\n"
        "json.dump(f(rank, world), open(f'{out}.{world}.{rank}', 'w'))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for world in (1, 2):
        processes = [
            subprocess.Popen([sys.executable, "-c", code, str(rank), str(world), str(tmp_path / "found")], env=env)
            for rank in range(world)
        ]
        assert [process.wait(120) for process in processes] == [0] * world
    import json

    one, *two = (json.loads((tmp_path / f"found.{name}").read_text()) for name in ("1.0", "2.0", "2.1"))
    assert one["kid"] > 0
    assert 0 < one["recall"] < 1
    for other in two:
        assert other.keys() == one.keys()
        for key in ("fid", "kid", "kid_std", "inception_score", "precision", "recall", "class_accuracy"):
            assert other[key] == pytest.approx(one[key], rel=1e-9), key


def figures_of_this_process(rank: int, world: int) -> dict[str, float | None]:
    """Return all figures of 128 pictures shared among processes."""
    torch.set_num_threads(1)
    extractor = Extractor("digits-cnn", class_layer="logits", score_layer="logits")
    generated, real = pictures(128, 1), pictures(140, 2)
    features = torch.cat([extractor.features(image[None])["96"] for image in real])
    statistics = features.double().mean(0).numpy(), np.cov(features.double().numpy(), rowvar=False)
    reference = Reference(*statistics, features, "test", {})
    chosen, _ = possible_metrics(None, extractor, reference, count=128, conditional=True, dinov2=None)
    quality = SampleQuality(chosen, 128, extractor, reference)
    for i in range(rank, 128, world):  # one by one: a batch's size moves features in the last digit
        quality.update(generated[i : i + 1], torch.tensor([i % 10]), torch.tensor([i]))
    return quality.compute()


def test_memory_of_fifty_thousand_images_stays_below_a_gigabyte():
    code = (
        "import torch, numpy as np\n"
        "from mf_lightning.metrics.fidelity import SampleQuality\n"
        "from mf_lightning.metrics.reference import Reference\n"
        "torch.set_num_threads(2)\n"
        "class Wide:\n"
        "    layer, score_layer, class_layer, dim, spatial, name = 'f', 'l', None, 2048, False, 'wide'\n"
        "    def features(self, images):\n"
        "        return {'f': FEATURES + images[0, 0, 0, 0], 'l': LOGITS}\n"
        "FEATURES, LOGITS = torch.randn(250, 2048), torch.randn(250, 1008)\n"
        "def peak():\n"
        "    return int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]) / 1e6\n"
        "real = torch.randn(4000, 2048)\n"
        "reference = Reference(np.zeros(2048), np.eye(2048), real, 'test', {})\n"
        "chosen = ['kid', 'precision', 'recall', 'inception_score']\n"  # FID's sums are there too, its eigenvalues take minutes
        "quality = SampleQuality(['fid', *chosen], 50_000, Wide(), reference)\n"
        "before = peak()\n"
        "for start in range(0, 50_000, 250):\n"
        "    image = torch.full((250, 1, 1, 1), start // 250, dtype=torch.uint8)\n"
        "    quality.update(image, None, torch.arange(start, start + 250))\n"
        "    quality.sums.clear()\n"  # their memory is the same however many batches follow, their time is not
        "quality.metrics = chosen\n"
        "import mf_lightning.metrics.fidelity as fidelity\n"
        "fidelity.KID_SUBSETS = 2\n"
        "print(quality.store.count, peak() - before)\n"
        "from mf_lightning.metrics import neighbours\n"
        "blocks = [neighbours.radii(rows, real.split(1000)) for rows in real[:1000].split(1000)]\n"
        "quality.metrics = ['kid', 'inception_score']\n"
        "quality.compute()\n"
        "quality.store.count = quality.store.mine = 3000\n"  # the same blocks, fewer of them
        "neighbours.precision_recall(quality.store, real)\n"
        "print(peak() - before)"
    )  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.0  # GB; 50,000 x 2,048 float32 alone are 0.41, twice that while joined


def test_a_reference_of_fifty_thousand_images_is_in_memory_once():
    code = (
        "import sys, torch\n"
        "from types import SimpleNamespace\n"
        "from mf_lightning.metrics.reference import ReferenceSums, load_reference, save_reference\n"
        "features, dummy = torch.randn(250, 2048), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)\n"
        "class Wide:\n"
        "    layer, dim, spatial, name, checksum = 'f', 2048, False, 'wide', '0' * 16\n"
        "    net = SimpleNamespace(get_dummy_input_for_compile=lambda: dummy)\n"
        "    def features(self, images): return {'f': features[: len(images)] + images[0, 0, 0, 0]}\n"
        "def peak():\n"
        "    return int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]) / 1e6\n"
        "before, sums = peak(), ReferenceSums(Wide())\n"
        "for start in range(0, 50_000, 250):\n"
        "    image = torch.full((250, 1, 1, 1), start // 250, dtype=torch.uint8)\n"
        "    sums.update(image, torch.arange(start, start + 250))\n"
        "    if start: sums.sums['f'].update = lambda features: None\n"  # their memory stays, their time would not
        "reference = sums.reference({'source': 'test'})\n"
        "save_reference(sys.argv[1], reference)\n"
        "del sums, reference\n"
        "assert load_reference(sys.argv[1], Wide()).features.shape == (50_000, 2048)\n"
        "print(peak() - before)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, f"{folder}/reference.npz"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.7  # GB; the features alone are 0.41


def test_precision_and_recall_hold_no_matrix_of_all_pairs():
    """20,000 by 20,000 float32 distances are 1.6 GB; three such matrices would be needed at once."""
    code = (
        "import torch\n"
        "from mf_lightning.metrics.neighbours import precision_recall\n"
        "from tests.test_quality import drawn, stored\n"
        "store, real = stored(drawn(20_000, 6, seed=1)), drawn(20_000, 6, seed=2)\n"
        "def peak():\n"
        "    return int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]) / 1e6\n"
        "before = peak()\n"
        "print(*precision_recall(store, real), peak() - before)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    precision, recall, grown = map(float, done.stdout.split())
    assert 0.5 < precision < 1
    assert 0.5 < recall < 1
    assert grown < 0.5


def test_equal_protocols_share_an_id_whatever_ema_and_nfe():
    one = {"extractor": "digits-cnn", "seed": 0, "ema": 0.995, "nfe": 1}
    assert protocol_id(one) == protocol_id({**one, "ema": None, "nfe": 4})
    assert protocol_id(one) == protocol_id({**one, "kid_subset_size": 100})
    assert protocol_id(one) != protocol_id({**one, "seed": 1})
