"""`reference`: real images => the .npz that generated ones are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from mf_lightning.metrics.extractor import Extractor
from mf_lightning.metrics.image_npz import members
from mf_lightning.metrics.kept import MOST
from mf_lightning.metrics.reference import Reference, ReferenceSums, load_reference, save_reference
from mf_lightning.tools.encode_processes import Processes
from mf_lightning.tools.encode_shards import exact
from mf_lightning.tools.pictures import NpzPictures, Pictures, cores, open_pictures
from mf_lightning.types import UserError


@dataclass(frozen=True)
class Scorers:
    """What turns pictures into features."""

    extractor: Extractor
    dinov2: Extractor | None

    def to(self, device: torch.device) -> Scorers:
        """Move the weights and return the scorers."""
        self.extractor.to(device)
        if self.dinov2 is not None:
            self.dinov2.to(device)
        return self


def reference(
    source: str,
    out: str,
    extractor: str = "inception-v3-compat",
    weights: str | None = None,
    layer: str | None = None,
    dinov2: str | None = None,
    dinov2_weights: str | None = None,
    image_size: int | None = None,
    split: str | None = None,
    autoencoder: str | None = None,
    max_features: int = MOST,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    follow_links: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the reference of real images: statistics for FID, sFID and FD-DINOv2, features for KID, precision and recall.

    Args:
        source: folder, zip, tars or parquet files of images, a data set of latents (they are decoded), or an .npz with uint8
            images as ``arr_0``, whose own mu and sigma are taken over where it has them.
        out: .npz file to write, whole or not at all.
        extractor: inception-v3-compat for the field's FID, digits-cnn for the quickstart's, or another of torch-fidelity's.
        weights: file of its weights; without it the extractor's own are taken, which most download.
        layer: features for FID, KID, precision and recall; without it the extractor's default.
        dinov2: also take the statistics of this extractor, such as dinov2-vit-l-14, for FD-DINOv2.
        dinov2_weights: file of its weights.
        image_size: edge of the square that is cropped from the middle of image files, as ADM does it; without it they must be
            of one size.
        split: of a data set; without it "train".
        autoencoder: that decodes a data set: folder, hub name or "pixel"; without it the one that the data set names.
        max_features: images whose features are stored, a random choice of more; 0 stores none.
        batch_size: images per call of an extractor.
        workers: threads that decode images; 0 takes this process's share of the CPU cores.
        device: "auto", "cuda" or "cpu".
        follow_links: also take what symbolic links out of a folder point to.
        overwrite: replace an existing file.

    Raises:
        UserError: images, options, weights or a destination that do not fit.
    """
    target = Path(out).expanduser()
    _check(target, overwrite, batch_size, workers, max_features, dinov2, dinov2_weights)
    processes = Processes()
    where = processes.device(device)
    make = cache(lambda: _scorers(extractor, weights, layer, dinov2, dinov2_weights))

    def plan() -> tuple[Pictures, Reference | None]:
        """Find everything out before an hour of work; the first process alone downloads and lists."""
        scorers = make()
        pictures = open_pictures(source, split=split, autoencoder=autoencoder, image_size=image_size, follow_links=follow_links)
        scorers.extractor.features(torch.zeros(1, *pictures.shape, dtype=torch.uint8))  # refuses other sizes
        if len(pictures) < 2:
            raise UserError(f"Got {len(pictures)} image(s) in '{source}', expected at least 2. Give more.")
        return pictures, _stored(source, pictures, scorers.extractor)

    try:
        pictures, stored = processes.from_first(plan)
        found = _work(pictures, make().to(where), processes, where, batch_size, workers, max_features)
        if processes.rank == 0:
            _finish(target, found, stored, make().extractor)
        processes.wait_for_all()
    finally:
        processes.part()


def _check(
    out: Path, overwrite: bool, batch_size: int, workers: int, most: int, dinov2: str | None, weights: str | None
) -> None:
    if out.suffix != ".npz":
        raise UserError(f"Got OUT = '{out}', expected a name that ends in .npz.")
    if out.exists() and not overwrite:
        raise UserError(f"Got OUT = '{out}', which exists, expected a new file. Give another name, or --overwrite=true.")
    if batch_size < 1 or workers < 0 or most < 0:
        raise UserError(
            f"Got --batch_size={batch_size} --workers={workers} --max_features={most}, expected at least 1, 0 (this process's "
            "share of the cores) and 0 (none)."
        )
    if dinov2 is None and weights is not None:
        raise UserError("Got --dinov2_weights without --dinov2, which they are for. Give --dinov2=dinov2-vit-l-14, or neither.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Got OUT = '{out}', which cannot be written ({error.strerror}), expected a place for it.") from error


def _scorers(extractor: str, weights: str | None, layer: str | None, dinov2: str | None, dinov2_weights: str | None) -> Scorers:
    spatial = Extractor.provides_spatial(extractor)
    first = Extractor(extractor, weights=weights, layer=layer, spatial=spatial, option="--weights")
    if dinov2 is None:
        return Scorers(first, None)
    return Scorers(first, Extractor(dinov2, weights=dinov2_weights, layer="dinov2", option="--dinov2_weights"))


def _stored(source: str, pictures: Pictures, extractor: Extractor) -> Reference | None:
    """Return the statistics that an .npz of images brings along; they are of more images than it holds."""
    if not isinstance(pictures, NpzPictures):
        return None
    path = Path(source).expanduser()
    if not members(path) & {"mu", "ref_mu"}:
        return None
    found = load_reference(path, extractor)
    return Reference(found.mu, found.sigma, None, found.name, found.about, found.spatial)


def _work(
    pictures: Pictures,
    scorers: Scorers,
    processes: Processes,
    device: torch.device,
    batch_size: int,
    workers: int,
    max_features: int,
) -> Reference:
    """Return the reference of all pictures, each process taking a part of them in a row."""
    first, last = (len(pictures) * part // processes.world for part in (processes.rank, processes.rank + 1))
    workers = workers or max(1, min(16, cores() // processes.local_world))
    sums = ReferenceSums(
        scorers.extractor, dinov2=scorers.dinov2, max_features=min(max_features, len(pictures)), shared=processes.world > 1
    )
    with exact(), tqdm(total=len(pictures), desc="Reference", unit="image", disable=processes.rank != 0) as bar:

        def progress(count: int) -> None:
            bar.update(processes.counted(count) - bar.n)

        seen = first
        for images in pictures.batches(first, last, size=batch_size, device=device, workers=workers):
            sums.update(images, torch.arange(seen, seen + len(images)))
            seen += len(images)
            progress(len(images))
        processes.wait_for_all(lambda: progress(0))
    return sums.reference(pictures.about)


def _finish(out: Path, found: Reference, stored: Reference | None, extractor: Extractor) -> None:
    about, count = found.about, found.about["count"]
    statistics = f"of {count:,} images"
    if stored is not None:
        about = {**about, "statistics": f"those that {stored.name} brings along"}
        found = Reference(stored.mu, stored.sigma, found.features, found.name, about, stored.spatial, found.dinov2)
        statistics = f"that {stored.name} brings along"
    try:
        save_reference(out, found)
    except OSError as error:
        raise UserError(
            f"Got OUT = '{out}', which could not be written ({error.strerror or error}), expected space for it."
        ) from error
    dinov2 = [f"FD-DINOv2 ({about['dinov2']['extractor']})"] if found.dinov2 else []
    kinds = ["FID", *(["sFID"] if found.spatial else []), *dinov2]
    print(f"{out}: mu and sigma for {', '.join(kinds)} {statistics} under {extractor.name}, {out.stat().st_size / 1e6:,.1f} MB")
    if found.features is None:
        print("  no features of single images: KID, precision and recall stay off")
    else:
        chosen = f", a random choice of {count:,}" if len(found.features) < count else ""
        print(f"  features of {len(found.features):,} images for KID, precision and recall{chosen}")
    if stored is None and count <= extractor.dim:
        print(
            f"  warning: {count:,} images for {extractor.dim:,} features make a singular covariance: FID will be biased upwards"
        )
