"""The files of FID, KID and Inception Score: from features, and from images through the extractor."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from mf_lightning.metrics import fidelity
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.reference import reference_of_features
from tests.parity.inception import checksum, seeded_inception_weights
from tests.parity.report import FAIL, Checks, MissingArray, Oracle

OF_FEATURES, OF_IMAGES = 1e-6, 1e-4
IMAGE_KID = {"kid_subsets": 20, "kid_subset_size": 32, "rng_seed": 2020}
"""What fid_images.npz was made with; stored settings of these names win."""


def our_fid(features: Tensor, reference: Tensor) -> float:
    return fidelity.fid(features, reference_of_features(reference, name="stored", about={}))


def their_kid(features: Tensor, reference: Tensor, **settings) -> tuple[float, float]:
    """Return mean and std of torch-fidelity's KID: our own function has its defaults only."""
    found = kid_features_to_metric(features, reference, verbose=False, **settings)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def their_score(logits: Tensor, *, splits: int, shuffle: bool, seed: int) -> tuple[float, float]:
    """Return mean and std of torch-fidelity's Inception Score."""
    found = isc_features_to_metric(logits, splits, shuffle, seed)
    return found["inception_score_mean"], found["inception_score_std"]


def check_features(oracle: Oracle) -> Checks:
    """Compare the figures of stored features and logits."""
    checks = Checks(oracle)
    one, two = oracle["features1"], oracle["features2"]
    for key, features in (("1", one), ("2", two)):
        reference = reference_of_features(features, name="stored", about={})
        checks.close(f"mu{key}", reference.mu, bound=OF_FEATURES)
        checks.close(f"sigma{key}", reference.sigma, bound=OF_FEATURES)
    low = one[: oracle.number("n_low")]
    for way in ("", "_svd", "_scipy_sqrtm"):
        checks.close(f"fid{way}", lambda: our_fid(one, two), bound=OF_FEATURES)
        checks.close(f"fid_rank_deficient{way}", lambda: our_fid(low, two), bound=OF_FEATURES)
    checks.close("fid_float32_features", lambda: our_fid(one.float(), two.float()), bound=OF_FEATURES)
    itself, trace = our_fid(one, one), reference_of_features(one, name="stored", about={}).sigma.trace()
    error = (abs(itself) + abs(itself - oracle.number("fid_same_set"))) / trace
    checks.judge("fid_same_set", float(error), OF_FEATURES, "absolute, over the trace of the covariance")
    _check_kid(checks, one, two)
    _check_score(checks)
    return checks


def _check_kid(checks: Checks, one: Tensor, two: Tensor) -> None:
    oracle = checks.oracle
    subsets, size, seed = (oracle.number(key) for key in ("kid_subsets", "kid_subset_size", "rng_seed"))
    settings = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed}
    note = "torch-fidelity's function with the file's settings"
    _check_pair(checks, "kid", their_kid(one, two, **settings), OF_FEATURES, note)
    if (subsets, seed) == (fidelity.KID_SUBSETS, fidelity.RNG_SEED):
        name = "kid_mean (ours)"
        checks.close(
            "kid_mean", lambda: fidelity.kid(lambda n: one[n], len(one), two, subset_size=size)[0], name=name, bound=OF_FEATURES
        )

    found = [match for key in oracle.arrays if (match := re.fullmatch(r"kid_rbf(\d+)p(\d+)_mean", key))]
    if not found:
        checks.add("kid_rbf<sigma>_mean", FAIL, None, OF_FEATURES, f"missing array in {oracle.name}")
    for whole, decimals in (match.groups() for match in found):
        kernel = {"kid_kernel": "rbf", "kid_kernel_rbf_sigma": float(f"{whole}.{decimals}")}
        _check_pair(checks, f"kid_rbf{whole}p{decimals}", their_kid(one, two, **settings, **kernel), OF_FEATURES, note)

    found = [match for key in oracle.arrays if (match := re.fullmatch(r"kid_first(\d+)_one_subset", key))]
    if not found:
        checks.add("kid_first<n>_one_subset", FAIL, None, OF_FEATURES, f"missing array in {oracle.name}")
    for match in found:
        n = int(match[1])
        mean, _ = their_kid(one[:n], two[:n], kid_subsets=1, kid_subset_size=n)
        checks.close(match[0], mean, bound=OF_FEATURES, note=note)


def _check_score(checks: Checks) -> None:
    oracle = checks.oracle
    logits, splits, seed = oracle["logits"], oracle.number("isc_splits"), oracle.number("rng_seed")
    note = "torch-fidelity's function with the file's settings"
    checks.close("prob", logits.softmax(dim=1), bound=OF_FEATURES)
    shuffled = their_score(logits, splits=splits, shuffle=True, seed=seed)
    _check_pair(checks, "isc", shuffled, OF_FEATURES, note)
    if (splits, seed) == (10, fidelity.RNG_SEED):
        name = "isc_mean (ours)"
        checks.close("isc_mean", lambda: fidelity.inception_score(logits), name=name, bound=OF_FEATURES)
    in_order = their_score(logits, splits=splits, shuffle=False, seed=seed)
    _check_pair(checks, "isc_noshuffle", in_order, OF_FEATURES, note)
    whole, _ = their_score(logits, splits=1, shuffle=False, seed=seed)
    checks.close("isc_one_split", whole, bound=OF_FEATURES, note=note)


def _check_pair(checks: Checks, name: str, found: tuple[float, float], bound: float, note: str = "") -> None:
    for part, value in zip(("mean", "std"), found, strict=True):
        checks.close(f"{name}_{part}", value, bound=bound, note=note)


def check_images(oracle: Oracle) -> Checks:
    """Compare the whole chain: uint8 images, the extractor's own resize, features, figures."""
    checks = Checks(oracle)
    weights = seeded_inception_weights(oracle.number("inception_seed"))
    digest = torch.frombuffer(bytearray(checksum(weights)), dtype=torch.uint8)
    checks.same("weights_sha256", digest, note="seeded weights as drawn here")
    images = [oracle["images1"], oracle["images2"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pt"
        torch.save(weights, path)
        deep = Extractor("inception-v3-compat", weights=str(path), class_layer="logits_unbiased")
        shallow = Extractor("inception-v3-compat", weights=str(path), layer="64")
    f64 = [_features(shallow, each)["64"] for each in images]
    found = [_features(deep, each) for each in images]
    f2048, logits = [each["2048"] for each in found], [each["logits_unbiased"] for each in found]

    for i in (0, 1):
        checks.close(f"features64_{i + 1}", f64[i], bound=OF_IMAGES)
        checks.close(f"features2048_{i + 1}_first8", f2048[i][:8], bound=OF_IMAGES)
    for key in sorted(k for k in oracle.arrays if k.startswith("logits_unbiased_")) or ["logits_unbiased_1_first8"]:
        checks.close(key, logits[0 if "_1_" in key else 1][:8], bound=OF_IMAGES)
    checks.close("fid_64", lambda: our_fid(*f64), bound=OF_IMAGES)
    checks.close("fid_2048", lambda: our_fid(*f2048), bound=OF_IMAGES)
    of_kid = {key: _setting(oracle, key, value) for key, value in IMAGE_KID.items()}
    note = ", ".join(f"{key} {value}" for key, value in of_kid.items())
    _check_pair(checks, "kid", their_kid(*f2048, **of_kid), OF_IMAGES, note)
    _check_pair(checks, "isc", their_score(logits[0], splits=10, shuffle=True, seed=2020), OF_IMAGES)
    checks.close("isc_mean", lambda: fidelity.inception_score(logits[0]), name="isc_mean (ours)", bound=OF_IMAGES)
    return checks


def _setting(oracle: Oracle, key: str, default: int) -> int:
    return int(oracle.number(key)) if key in oracle else default


def _features(extractor: Extractor, images: Tensor, batch_size: int = 32) -> dict[str, Tensor]:
    """Return features of all images, batch by batch."""
    if not len(images):
        raise MissingArray("missing images: the stored array is empty; compute the file again")
    batches = [extractor.features(batch) for batch in images.split(batch_size)]
    return {layer: torch.cat([batch[layer] for batch in batches]) for layer in batches[0]}
