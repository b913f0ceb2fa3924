"""References: the real images' side of every figure, in one .npz file.

mu, sigma                     float64, of the layer that FID reads; also read as ref_mu, ref_sigma
mu_s, sigma_s                 of sFID's layer, in ADM's names
mu_dinov2, sigma_dinov2       of DINOv2's features
features                      (N, D) float32 of FID's layer, for KID, precision and recall
arr_0                         (N, H, W, c) uint8 images, in ADM's files: their features are computed when asked for
about                         JSON text: extractor, layer, dinov2, source, count, ...
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mf_lightning.metrics.extractor import SPATIAL, Extractor
from mf_lightning.metrics.image_npz import DAMAGED, ImageNpz, members
from mf_lightning.metrics.kept import MOST, KeptFeatures
from mf_lightning.metrics.sums import FeatureSums
from mf_lightning.types import UserError

SPATIAL_DIM = 7 * 17 * 17
READ = ("mu", "sigma", "ref_mu", "ref_sigma", "mu_s", "sigma_s", "mu_dinov2", "sigma_dinov2", "features", "about")
HOW = "Give the path of a reference .npz, or null to compute it from the training split."


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of one kind of features."""

    mu: np.ndarray
    """(D,) float64."""
    sigma: np.ndarray
    """(D, D) float64, n - 1 divisor."""


class Reference:
    """Statistics of real images under one extractor.

    Args:
        mu: mean of the features, (D,) float64.
        sigma: their covariance (n - 1 divisor), (D, D) float64.
        features: of single images, (N, D) float32, for KID, precision and recall; or what computes them when they are first
            asked for; None where the file holds only mu and sigma.
        name: file name and the first 16 digits of its checksum, for the protocol.
        about: what the file says of itself: extractor, source, count; empty for other projects' files.
        spatial: statistics of sFID's layer, if there are any.
        dinov2: statistics of DINOv2's features, if there are any.
    """

    def __init__(
        self,
        mu: np.ndarray,
        sigma: np.ndarray,
        features: Tensor | Callable[[], Tensor] | None,
        name: str,
        about: dict[str, Any],
        spatial: Statistics | None = None,
        dinov2: Statistics | None = None,
    ) -> None:
        self.mu, self.sigma = mu, sigma
        self.name, self.about = name, about
        self.spatial, self.dinov2 = spatial, dinov2
        self._features = features
        self.radii: Tensor | None = None
        """Reach of each feature's ball, (N,), for precision and recall; made by who first asks for it."""

    @property
    def has_features(self) -> bool:
        """Whether there are features of single images, without computing them."""
        return self._features is not None

    @cached_property
    def features(self) -> Tensor | None:
        """Features of single images, (N, D) float32, computed on first use where the file holds images; None without."""
        return self._features() if callable(self._features) else self._features


class ReferenceSums:
    """What becomes a reference, image by image; memory does not grow with their number.

    Args:
        extractor: of FID's features, and of sFID's where its ``spatial`` is true.
        dinov2: of DINOv2's features; None does without.
        max_features: images whose features are kept for KID, precision and recall.
        shared: begin all sums at the features of a grey image: those of several processes can only be joined so.
    """

    def __init__(
        self, extractor: Extractor, *, dinov2: Extractor | None = None, max_features: int = MOST, shared: bool = False
    ) -> None:
        self.extractor, self.dinov2 = extractor, dinov2
        self.kept = KeptFeatures(extractor.dim, max_features)
        grey = torch.full_like(extractor.net.get_dummy_input_for_compile()[:1], 128)
        self.sums: dict[str, FeatureSums] = {}
        for layer, value in self._extract(grey).items():
            self.sums[layer] = FeatureSums(value.shape[1], centre=value[0].double().cpu().numpy() if shared else None)

    def _extract(self, images: Tensor) -> dict[str, Tensor]:
        found = self.extractor.features(images)
        wanted = [self.extractor.layer, *([SPATIAL] if self.extractor.spatial else [])]
        more = {} if self.dinov2 is None else {"dinov2": self.dinov2.features(images)[self.dinov2.layer]}
        return {layer: found[layer] for layer in wanted} | more

    def update(self, images: Tensor, index: Tensor) -> None:
        """Add uint8 images, (B, c, H, W), of these numbers, (B,)."""
        found = self._extract(images)
        for layer, features in found.items():
            self.sums[layer].update(features)
        self.kept.add(index, found[self.extractor.layer])

    def reference(self, about: dict[str, Any]) -> Reference:
        """Return the reference over the images of all processes, features on the first one; every process calls it.

        Raises:
            UserError: fewer than two images.
        """
        sums = {layer: part.over_processes() for layer, part in self.sums.items()}
        count = sums[self.extractor.layer].count
        if count < 2:
            raise UserError(f"Got {count} image(s) for a reference, expected at least 2. Give more.")
        found = {layer: Statistics(*part.statistics()) for layer, part in sums.items()}
        fid = found[self.extractor.layer]
        features = self.kept.over_processes().sorted() if self.kept.most else None
        kept = {} if features is None or count <= self.kept.most else {"kept": self.kept.most, "kept_seed": self.kept.seed}
        dinov2 = self.dinov2 and identity(self.dinov2)
        about = {**identity(self.extractor), "dinov2": dinov2, **about, "count": count, **kept}
        return Reference(fid.mu, fid.sigma, features, "computed", about, found.get(SPATIAL), found.get("dinov2"))


def identity(extractor: Extractor) -> dict[str, str]:
    """Return name and layer of an extractor and a checksum of its weights: references of others do not compare."""
    return {"extractor": extractor.name, "layer": extractor.layer, "weights": extractor.checksum}


def reference_of_features(features: Tensor, *, name: str, about: dict) -> Reference:
    """Return the statistics of features, (N, D)."""
    sums = FeatureSums(features.shape[1])
    sums.update(features)
    return Reference(*sums.statistics(), features, name, about)


def compute_reference(
    extractor: Extractor,
    images: Iterable[Tensor],
    *,
    source: str,
    dinov2: Extractor | None = None,
    max_features: int = MOST,
) -> Reference:
    """Return the reference of uint8 images, batches of (B, c, H, W), on this process alone.

    Args:
        extractor: of the features; sFID's are taken along where its ``spatial`` is true.
        images: the batches; none is kept.
        source: what they are, in words.
        dinov2: of DINOv2's features; None does without.
        max_features: images whose features are kept for KID, precision and recall.
    """
    sums, seen = ReferenceSums(extractor, dinov2=dinov2, max_features=max_features), 0
    for batch in images:
        sums.update(batch, torch.arange(seen, seen + len(batch)))
        seen += len(batch)
    return sums.reference({"source": source})


def save_reference(path: str | Path, reference: Reference, **more: Any) -> None:
    """Write a reference, as a whole file or not at all; ``more`` is added to what it says of itself."""
    arrays: dict[str, Any] = {"mu": reference.mu, "sigma": reference.sigma}
    for ending, statistics in (("s", reference.spatial), ("dinov2", reference.dinov2)):
        if statistics is not None:
            arrays |= {f"mu_{ending}": statistics.mu, f"sigma_{ending}": statistics.sigma}
    if reference.has_features:
        arrays["features"] = reference.features.numpy()
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as stream:
            np.savez(stream, **arrays, about=json.dumps({**reference.about, **more}))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load_reference(
    path: str | Path, extractor: Extractor, *, dinov2: Extractor | None = None, cache: Path | None = None
) -> Reference:
    """Read a reference: ours, or any .npz with mu and sigma (ADM, pytorch-fid, torch-fidelity, JiT, official MeanFlow).

    Args:
        path: of the file.
        extractor: that the reference must be of; it also makes the features of images in the file, when they are asked for.
        dinov2: extractor that the reference's statistics of DINOv2 must be of, if they are asked for.
        cache: folder in which these are kept; None computes them in every process.

    Raises:
        UserError: no such file, not such a file, or of another extractor or feature size.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"Got the reference '{path}', which is no file, expected an .npz with mu and sigma. {HOW}")
    try:
        present = members(path)
        with np.load(path, allow_pickle=False) as file:
            stored = {key: file[key] for key in READ if key in file}
        about = json.loads(str(stored["about"])) if "about" in stored else {}
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"Got the reference '{path}', which cannot be read ({reason}), expected an .npz. {HOW}") from error
    name = f"{path.name}@{_checksum(path)}"
    fid = _statistics_of(stored, path, present)
    _check_extractor(about, extractor, path)
    if dinov2 is not None and "mu_dinov2" in stored:
        told = about.get("dinov2") or {}
        _check_extractor({"extractor": told} if isinstance(told, str) else told, dinov2, path)
    _check_size(fid, extractor.dim, f"'{extractor.name}', layer {extractor.layer}", path)
    more = {key: _pair(stored, f"mu_{key}", f"sigma_{key}", path) for key in ("s", "dinov2")}
    if more["s"] is not None:
        _check_size(more["s"], SPATIAL_DIM, "sFID's layer", path)
    if more["dinov2"] is not None and dinov2 is not None:
        _check_size(more["dinov2"], dinov2.dim, f"'{dinov2.name}'", path)
    features: Any = torch.from_numpy(stored["features"]) if "features" in stored else None
    if features is not None and (features.dim() != 2 or features.shape[1] != extractor.dim):
        raise UserError(f"Got features of shape {tuple(features.shape)} in '{path}', expected (N, {extractor.dim}). {HOW}")
    if features is None and "arr_0" in present:
        features = _ImageFeatures(path, name, extractor, cache)
    return Reference(fid.mu, fid.sigma, features, name, about, more["s"], more["dinov2"])


def _statistics_of(stored: dict[str, np.ndarray], path: Path, present: set[str]) -> Statistics:
    for mu, sigma in (("mu", "sigma"), ("ref_mu", "ref_sigma")):
        if (found := _pair(stored, mu, sigma, path)) is not None:
            return found
    how = HOW
    if "arr_0" in present:
        how = f"Its images can become one: python -m mf_lightning reference {path} OUT.npz"
    raise UserError(f"Got the reference '{path}' with {sorted(present)}, expected mu and sigma in it. {how}")


def _pair(stored: dict[str, np.ndarray], mu: str, sigma: str, path: Path) -> Statistics | None:
    if mu not in stored or sigma not in stored:
        return None
    mean, covariance = stored[mu], stored[sigma]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"Got {mu} of shape {mean.shape} and {sigma} of shape {covariance.shape} in '{path}', which has "
            f"{mean.size} features, expected shapes (D,) and (D, D). {HOW}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"Got {mu} and {sigma} of '{path}' with values that are not finite, expected finite ones. {HOW}")
    return Statistics(mean.astype(np.float64), covariance.astype(np.float64))


def _check_size(found: Statistics, dim: int, what: str, path: Path) -> None:
    if len(found.mu) != dim:
        raise UserError(f"Got the reference '{path}' with {len(found.mu)} features, expected {dim} of {what}. {HOW}")


def _check_extractor(about: dict[str, Any], extractor: Extractor, path: Path) -> None:
    ours = identity(extractor)
    if any(about.get(key, value) != value for key, value in ours.items()):
        theirs = {key: about.get(key) for key in ours}
        raise UserError(f"Got the reference '{path}' made with {theirs}, expected one made with {ours}. {HOW}")


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:16]


class _ImageFeatures:
    """Features of a file's images, made on the extractor's device by the process that comes first and kept for the others."""

    def __init__(self, path: Path, name: str, extractor: Extractor, cache: Path | None) -> None:
        self.images = ImageNpz(path)  # refuses what holds no images at the start
        self.name, self.extractor, self.cache = name, extractor, cache

    def __call__(self) -> Tensor:
        if self.cache is None:
            return self._computed()
        key = hashlib.sha256(json.dumps([self.name, identity(self.extractor)]).encode()).hexdigest()[:12]
        file = self.cache / f"reference-{key}-features.npy"
        self.cache.mkdir(parents=True, exist_ok=True)
        with file.with_name(f".{file.name}.lock").open("ab") as lock:
            _wait_for(lock)
            if not file.exists():
                aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
                with aside.open("wb") as stream:
                    np.save(stream, self._computed().numpy())
                aside.replace(file)
        return torch.from_numpy(np.load(file, allow_pickle=False))

    def _computed(self) -> Tensor:
        kept, seen = KeptFeatures(self.extractor.dim), 0
        for batch in self.images.batches(64):
            kept.add(torch.arange(seen, seen + len(batch)), self.extractor.features(batch)[self.extractor.layer])
            seen += len(batch)
        return kept.sorted()


def _wait_for(lock: Any) -> None:
    """Hold a lock until its file is closed, where there are locks; else each process works for itself."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
