"""FID and friends: torch-fidelity's formulas on sums and blocks, so that memory does not grow with the number of images.

Every image has a number, and process ``i mod world size`` has image i: figures depend neither on batch size nor on how many
processes share the images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from mf_lightning.metrics.extractor import SPATIAL, Extractor
from mf_lightning.metrics.neighbours import NEIGHBOURS, all_radii, precision_recall
from mf_lightning.metrics.processes import summed, world
from mf_lightning.metrics.protocol import NAMES
from mf_lightning.metrics.reference import SPATIAL_DIM, Reference
from mf_lightning.metrics.score import SPLITS, ScoreSums
from mf_lightning.metrics.store import FeatureStore
from mf_lightning.metrics.sums import FeatureSums

KID_SUBSETS, KID_SUBSET_SIZE, RNG_SEED = 100, 1000, 2020
"""torch-fidelity's defaults; with fewer images than a subset has, subsets are as large as the smaller set."""
NEED_FEATURES = ("kid", "precision", "recall")
"""Figures that need features of the real images one by one."""


def frechet(mu: np.ndarray, sigma: np.ndarray, mu_real: np.ndarray, sigma_real: np.ndarray) -> float:
    """Return the Frechet distance of two normals with means, (D,), and covariances, (D, D) (torch-fidelity, ``metric_fid``)."""
    mine, theirs = {"mu": mu, "sigma": sigma}, {"mu": mu_real, "sigma": sigma_real}
    return fid_statistics_to_metric(mine, theirs, verbose=False)["frechet_inception_distance"]


def kid_subset_size(count: int, reference: Reference) -> int:
    """Return the size of KID's subsets: torch-fidelity's 1,000, or all images of the smaller set."""
    return min(KID_SUBSET_SIZE, count, len(reference.features))


def bias_of_few(count: int, extractor: Extractor, dinov2: Extractor | None = None) -> str | None:
    """Return what so few images do to Frechet distances, in a sentence; None where they are enough."""
    sizes = {"fid": extractor.dim, "sfid": SPATIAL_DIM if extractor.spatial else 0, "fd_dinov2": dinov2.dim if dinov2 else 0}
    few = {metric: size for metric, size in sizes.items() if count <= size}
    if not few:
        return None
    return (
        f"{count:,} images for {max(few.values()):,} features: their covariance is singular, and {', '.join(few)} biased "
        "upwards by some amount that depends on the count."
    )


def fid(features: Tensor, reference: Reference) -> float:
    """Return the Frechet distance of features, (N, D), to the reference."""
    sums = FeatureSums(len(reference.mu), centre=reference.mu)
    sums.update(features)
    return frechet(*sums.statistics(), reference.mu, reference.sigma)


def inception_score(logits: Tensor) -> float:
    """Return the mean Inception Score over ten shuffled splits of class logits, (N, K)."""
    sums = ScoreSums(*logits.shape)
    sums.update(torch.arange(len(logits)), logits)
    return sums.compute()[0]


def kid(
    rows: Callable[[np.ndarray], Tensor], count: int, real: Tensor, *, subset_size: int = KID_SUBSET_SIZE
) -> tuple[float, float]:
    """Return mean and standard deviation of the kernel distance over 100 random subsets (torch-fidelity, ``metric_kid``).

    Each process computes some of the subsets; every process calls it.

    Args:
        rows: numbers of images, (B,) => their features, (B, D).
        count: generated images.
        real: features, (M, D).
        subset_size: images in a subset; fewer if a set has fewer.
    """
    size = min(subset_size, count, len(real))
    random, found = np.random.RandomState(RNG_SEED), torch.zeros(KID_SUBSETS, dtype=torch.float64)
    rank, processes = world()
    theirs = real.numpy()
    for subset in range(KID_SUBSETS):
        mine, other = (random.choice(n, size, replace=False) for n in (count, len(real)))
        ours = rows(mine)
        if subset % processes == rank:
            found[subset] = float(kernel_mmd(ours.numpy(), theirs[other]))
    found = summed(found)
    return found.mean().item(), found.std(correction=0).item()


class SampleQuality:
    """Figures of generated images against a reference, each image given once, on the process that has its number.

    Args:
        metrics: names of ``mf_lightning.metrics.protocol.METRICS``.
        count: images of all processes.
        extractor: uint8 images => features.
        reference: statistics of the real images.
        dinov2: extractor of "fd_dinov2".
    """

    def __init__(
        self, metrics: list[str], count: int, extractor: Extractor, reference: Reference, *, dinov2: Extractor | None = None
    ) -> None:
        self.metrics, self.count = metrics, count
        self.extractor, self.reference, self.dinov2 = extractor, reference, dinov2
        self.sums: dict[str, FeatureSums] = {}
        for name, statistics in (("fid", reference), ("sfid", reference.spatial), ("fd_dinov2", reference.dinov2)):
            if name in metrics:
                self.sums[name] = FeatureSums(len(statistics.mu), centre=statistics.mu)
        stored = any(name in metrics for name in NEED_FEATURES)
        self.store = FeatureStore(count, extractor.dim) if stored else None
        self.score: ScoreSums | None = None
        self.correct = self.asked = 0

    def update(self, images: Tensor, labels: Tensor | None, index: Tensor) -> None:
        """Add uint8 images, (B, c, H, W), the labels asked for, (B,) or None, and the images' numbers, (B,)."""
        found = self.extractor.features(images)
        for name, layer in (("fid", self.extractor.layer), ("sfid", SPATIAL)):
            if name in self.sums:
                self.sums[name].update(found[layer])
        if "fd_dinov2" in self.sums:
            self.sums["fd_dinov2"].update(self.dinov2.features(images)[self.dinov2.layer])
        if self.store is not None:
            self.store.add(index, found[self.extractor.layer])
        if "inception_score" in self.metrics:
            logits = found[self.extractor.score_layer]
            if self.score is None:
                self.score = ScoreSums(self.count, logits.shape[1])
            self.score.update(index, logits)
        if "class_accuracy" in self.metrics and labels is not None:
            self.correct += int((found[self.extractor.class_layer].argmax(dim=1).cpu() == labels.cpu()).sum())
            self.asked += len(labels)

    def compute(self) -> dict[str, float | None]:
        """Return each figure over the images of all processes, None for one that was not asked for; every process calls it."""
        figures: dict[str, float | None] = dict.fromkeys((*NAMES, "kid_std", "inception_score_std"))
        for name, statistics in (
            ("fid", self.reference),
            ("sfid", self.reference.spatial),
            ("fd_dinov2", self.reference.dinov2),
        ):
            if name in self.sums:
                mu, sigma = self.sums[name].over_processes().statistics()
                figures[name] = frechet(mu, sigma, statistics.mu, statistics.sigma)
        if "kid" in self.metrics:
            figures["kid"], figures["kid_std"] = kid(self.store.rows, self.count, self.reference.features)
        if "precision" in self.metrics or "recall" in self.metrics:
            real = self.reference
            if real.radii is None:  # once for all NFE and averages
                real.radii = all_radii(real.features)
            both = dict(zip(("precision", "recall"), precision_recall(self.store, real.features, real.radii), strict=True))
            figures.update({name: value for name, value in both.items() if name in self.metrics})
        if "inception_score" in self.metrics:
            figures["inception_score"], figures["inception_score_std"] = self._score().compute()
        if "class_accuracy" in self.metrics:
            correct, asked = summed(torch.tensor([self.correct, self.asked])).tolist()
            figures["class_accuracy"] = correct / asked if asked else None
        return figures

    def _score(self) -> ScoreSums:
        """Return the sums, empty ones on a process that had no image."""
        if self.score is None:
            images = self.extractor.net.get_dummy_input_for_compile()
            self.score = ScoreSums(self.count, self.extractor.features(images)[self.extractor.score_layer].shape[1])
        return self.score


def possible_metrics(
    asked: list[str] | None,
    extractor: Extractor,
    reference: Reference,
    *,
    count: int,
    conditional: bool,
    dinov2: Extractor | None,
) -> tuple[list[str], dict[str, str]]:
    """Return which figures can be computed, and why others cannot.

    Args:
        asked: names; None takes all that can be.
        extractor: with its layers.
        reference: with or without features.
        count: images that will be made.
        conditional: whether images are made of a class.
        dinov2: extractor of "fd_dinov2".
    """
    checks = {
        "sfid": [
            (extractor.spatial, f"{extractor.name} has no such layer"),
            (reference.spatial is not None, f"{reference.name} holds no mu_s and sigma_s"),
        ],
        "fd_dinov2": [
            (dinov2 is not None, "sample_eval.dinov2 is null"),
            (reference.dinov2 is not None, f"{reference.name} holds no mu_dinov2 and sigma_dinov2"),
        ],
        "inception_score": [
            (extractor.score_layer is not None, f"{extractor.name} has no class logits"),
            (count >= SPLITS, f"fewer than {SPLITS} images"),
        ],
        "class_accuracy": [
            (extractor.class_layer is not None, "sample_eval.class_layer is null"),
            (conditional, "images have no class"),
        ],
    }
    for name in NEED_FEATURES:
        checks[name] = [
            (reference.has_features, f"{reference.name} holds mu and sigma, but no features of single images"),
            (count > NEIGHBOURS, f"fewer than {NEIGHBOURS + 1} images"),
        ]
    off = {}
    for name in NAMES if asked is None else asked:
        reasons = [why for good, why in checks.get(name, []) if not good]
        if reasons:
            off[name] = reasons[0]
    return [name for name in NAMES if (asked is None or name in asked) and name not in off], off
