"""FID and friends: torch-fidelity's formulas behind torchmetrics' state handling.

Features are kept with the number of their image and sorted by it before anything is computed, so a figure depends neither
on batch size nor on how images were spread over devices.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.reference import Reference

KID_SUBSETS, KID_SUBSET_SIZE, RNG_SEED = 100, 1000, 2020
"""torch-fidelity's defaults."""


def fid(features: Tensor, reference: Reference) -> float:
    """Return the Frechet distance of features, (N, D), to the reference (torch-fidelity 0.4.0, ``metric_fid``)."""
    mine = {key: value.astype(np.float64) for key, value in fid_features_to_statistics(features).items()}
    theirs = {"mu": reference.mu, "sigma": reference.sigma}
    return fid_statistics_to_metric(mine, theirs, verbose=False)["frechet_inception_distance"]


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return precision and recall, each in [0, 1], of generated against real features, (N, D) and (M, D)."""
    found = prc_features_to_metric(features, reference, save_cpu_ram=True, verbose=False)
    return found["precision"], found["recall"]


def kid(features: Tensor, reference: Tensor, *, subset_size: int = KID_SUBSET_SIZE) -> float:
    """Return the mean kernel distance over torch-fidelity's 100 random subsets, (N, D) and (M, D) features."""
    found = kid_features_to_metric(
        features, reference, kid_subsets=KID_SUBSETS, kid_subset_size=subset_size, rng_seed=RNG_SEED, verbose=False
    )
    return found["kernel_inception_distance_mean"]


def inception_score(logits: Tensor) -> float:
    """Return the mean Inception Score over ten shuffled splits of class logits, (N, K)."""
    found = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=RNG_SEED)
    return found["inception_score_mean"]


class SampleQuality(Metric):
    """Quality of generated images against a reference: ``fid``, ``precision``, ``recall``, ``class_accuracy``.

    Precision and recall need a reference with features, class accuracy an extractor with a class layer and conditional
    samples; where these are missing the value is None.

    Args:
        extractor: uint8 images => features.
        reference: statistics of the real images.
    """

    full_state_update = False
    index: list[Tensor]
    features: list[Tensor]
    correct: list[Tensor]

    def __init__(self, extractor: Extractor, reference: Reference) -> None:
        super().__init__()
        self.extractor = extractor
        self.reference = reference
        for state in ("index", "features", "correct"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, labels: Tensor | None, index: Tensor) -> None:
        """Add uint8 images, (B, c, H, W), the labels asked for, (B,) or None, and the images' numbers, (B,)."""
        found = self.extractor.features(images)
        device = self.device
        self.index.append(index.to(device))
        self.features.append(found[self.extractor.layer].to(device))
        if labels is not None and self.extractor.class_layer is not None:
            hit = found[self.extractor.class_layer].argmax(dim=1).to(device) == labels.to(device)
            self.correct.append(hit.to(torch.float32))

    def compute(self) -> dict[str, float | None]:
        """Return each figure over the images of all processes."""
        order = torch.argsort(dim_zero_cat(self.index))
        features = dim_zero_cat(self.features)[order].cpu()
        precision = recall = None
        if self.reference.features is not None:
            precision, recall = precision_recall(features, self.reference.features)
        correct = dim_zero_cat(self.correct) if len(self.correct) else None
        return {
            "fid": fid(features, self.reference),
            "class_accuracy": None if correct is None else correct.double().mean().item(),
            "precision": precision,
            "recall": recall,
        }
