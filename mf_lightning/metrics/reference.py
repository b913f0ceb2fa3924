"""Reference statistics: the real images' side of FID, precision and recall, in one .npz file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from mf_lightning.metrics.extractor import Extractor
from mf_lightning.types import UserError


@dataclass(frozen=True)
class Reference:
    """Statistics of real images under one extractor."""

    mu: np.ndarray
    """Mean of the features, (D,) float64."""
    sigma: np.ndarray
    """Covariance (n - 1 divisor), (D, D) float64."""
    features: Tensor | None
    """All features, (N, D) float32, for precision and recall; None where the file holds only mu and sigma."""
    name: str
    """File name and the first 16 digits of its checksum, for the protocol."""
    about: dict
    """What the file says of itself: extractor, source, count; empty for other projects' files."""


def reference_of_features(features: Tensor, *, name: str, about: dict) -> Reference:
    """Return the statistics of features, (N, D), by torch-fidelity's formula."""
    statistics = fid_features_to_statistics(features)
    mu, sigma = statistics["mu"].astype(np.float64), statistics["sigma"].astype(np.float64)
    return Reference(mu, sigma, features, name, about)


def compute_reference(extractor: Extractor, images: Iterable[Tensor], *, source: str) -> Reference:
    """Return the statistics of uint8 images, batches of (B, c, H, W)."""
    features = torch.cat([extractor.features(batch)[extractor.layer].cpu() for batch in images])
    about = {"extractor": extractor.name, "layer": extractor.layer, "source": source, "count": len(features)}
    return reference_of_features(features, name="computed", about=about)


def save_reference(path: str | Path, reference: Reference, **more) -> None:
    """Write mu, sigma, features and, as JSON text, what they are; ``more`` is added to that text."""
    about = json.dumps({**reference.about, **more})
    np.savez(path, mu=reference.mu, sigma=reference.sigma, features=reference.features.numpy(), about=about)


def load_reference(path: str | Path, extractor: Extractor) -> Reference:
    """Read a reference file: ours, or any .npz with ``mu`` and ``sigma`` (ADM, pytorch-fid, torch-fidelity).

    Raises:
        UserError: no such file, not such a file, or of another extractor or feature size.
    """
    path = Path(path)
    how = "Give the path of a reference .npz, or null to compute it from the training split."
    if not path.is_file():
        raise UserError(f"Got the reference '{path}', which is no file, expected an .npz with mu and sigma. {how}")
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {key: file[key] for key in ("mu", "sigma", "features", "about") if key in file}
    except (ValueError, OSError) as error:
        raise UserError(f"Got the reference '{path}', which cannot be read ({error}), expected an .npz. {how}") from error
    if not {"mu", "sigma"} <= set(stored):
        raise UserError(f"Got the reference '{path}' with {sorted(stored)}, expected mu and sigma in it. {how}")
    about = json.loads(str(stored["about"])) if "about" in stored else {}
    ours = {"extractor": extractor.name, "layer": extractor.layer}
    if any(about.get(key, value) != value for key, value in ours.items()):
        raise UserError(f"Got the reference '{path}' made with {about}, expected one made with {ours}. {how}")
    if stored["mu"].shape != (extractor.dim,):
        raise UserError(
            f"Got the reference '{path}' with {stored['mu'].shape[0]} features, expected {extractor.dim} of "
            f"'{extractor.name}', layer {extractor.layer}. {how}"
        )
    features = torch.from_numpy(stored["features"]) if "features" in stored else None
    name = f"{path.name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    return Reference(stored["mu"].astype(np.float64), stored["sigma"].astype(np.float64), features, name, about)
