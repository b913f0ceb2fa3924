"""`encode`: images => a data set of latents, by any number of processes, at any number of attempts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from mf_lightning.autoencoders import KLAutoencoder, PixelAutoencoder
from mf_lightning.data.shards import DatasetInfo
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.tools.encode_out import UNREADABLE_FILE, EncodeOut
from mf_lightning.tools.encode_plan import Form, Plan, form_of, make_splits, settings_of, shards_of
from mf_lightning.tools.encode_processes import Processes
from mf_lightning.tools.encode_shards import Target, Task, encode_shards
from mf_lightning.types import UserError

PIXEL = "pixel"
INCEPTION = "inception-v3-compat"


def encode(
    source: str,
    out: str,
    autoencoder: str = "stabilityai/sd-vae-ft-mse",
    image_size: int = 256,
    labels: str | None = None,
    val_source: str | None = None,
    val_labels: str | None = None,
    val_fraction: float = 0.0,
    flip: bool = False,
    dtype: Literal["float16", "float32"] = "float16",
    shuffle_seed: int | None = None,
    shard_size: int = 3200,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
    unreadable: Literal["stop", "skip"] = "stop",
    follow_links: bool = False,
    reference: bool = False,
    extractor: str = INCEPTION,
    extractor_weights: str | None = None,
) -> None:
    """Encode images to a data set of latents; started again after an interruption it goes on with the next missing shard.

    Args:
        source: folder with a folder per class, folder with a labels file, zip or tar files, WebDataset tars, parquet files,
            or a pattern of such files.
        out: directory to make; another data set is never overwritten.
        autoencoder: hub name or folder of an AutoencoderKL in diffusers' layout, or "pixel" to store the pixels themselves.
        image_size: edge of the square that is cropped from the middle, as ADM does it.
        labels: labels file (.csv lines "NAME,LABEL", or .json), or "none" for images without classes; without it those of the
            source.
        val_source: images of the validation split, of the same classes.
        val_labels: their labels file, as for ``labels``.
        val_fraction: share of the images that become the validation split: the first of a permutation of seed 0.
        flip: also store the latents of the mirrored images.
        dtype: of the stored latents.
        shuffle_seed: order the samples by a permutation of this seed, so that each shard mixes classes; without it they are
            sorted by name.
        shard_size: samples per shard.
        batch_size: images per call of the autoencoder.
        workers: threads that decode images; 0 takes this process's share of the CPU cores.
        device: "auto", "cuda" or "cpu".
        unreadable: "stop" at the first image that cannot be read, or "skip" and list them in OUT/unreadable.jsonl.
        follow_links: also take what symbolic links out of a folder point to.
        reference: also write OUT/reference.npz, statistics of the cropped training images for FID.
        extractor: that makes the features of the reference.
        extractor_weights: file of its weights; without it the extractor's own are taken, which most download.

    Raises:
        UserError: images, labels, settings or a destination that do not fit.
    """
    _check(shard_size=shard_size, batch_size=batch_size, image_size=image_size)
    _check_numbers(val_fraction, workers, shuffle_seed)
    _check_pairs(val_source, val_labels, val_fraction, reference, extractor, extractor_weights)
    processes = Processes()
    where = processes.device(device)
    model = PixelAutoencoder() if autoencoder == PIXEL else KLAutoencoder(autoencoder)
    form = processes.from_first(lambda: form_of(model, image_size, dtype, flip))  # the first one downloads
    shape = (1, form.channels, image_size, image_size)
    make_extractor = cache(lambda: _extractor(extractor, extractor_weights, shape) if reference else None)
    result = EncodeOut(Path(out).expanduser())

    def plan() -> Plan:
        splits = make_splits(source, labels, val_source, val_labels, follow_links, val_fraction, shuffle_seed)
        settings = {**settings_of(form, splits), "source": _where(source), "val_source": _where(val_source)}
        settings |= {"val_fraction": val_fraction, "shuffle_seed": shuffle_seed, "shard_size": shard_size}
        settings |= {"batch_size": batch_size, "reference": _scorer_id(make_extractor(), extractor_weights)}
        whole = result.begin(settings)
        return Plan(splits, [] if whole else [key for key in shards_of(splits, shard_size) if not result.is_done(*key)], whole)

    try:
        todo = processes.from_first(plan)
        scorer = None if todo.whole else make_extractor()
        target = Target(model.to(where), where, image_size, form.channels, dtype, flip, scorer and scorer.to(where))
        if processes.rank == 0:
            _say_first(todo, form, result.path, shard_size)
        if not todo.whole:
            workers = workers or max(1, min(16, _cores() // processes.local_world))
            _work(todo, target, result, processes, shard_size, batch_size, workers, unreadable == "stop")
            if processes.rank == 0:
                about = {"extractor": extractor, "layer": scorer.layer, "source": Path(source).name} if scorer else None
                _finish(result, form.info, todo, shard_size, about, unreadable == "stop")
        processes.wait_for_all()
    finally:
        processes.part()


def _check(**at_least_one: int) -> None:
    for name, value in at_least_one.items():
        if value < 1:
            raise UserError(f"Got --{name}={value}, expected at least 1.")


def _check_numbers(val_fraction: float, workers: int, shuffle_seed: int | None) -> None:
    if shuffle_seed is not None and shuffle_seed < 0:
        raise UserError(f"Got --shuffle_seed={shuffle_seed}, expected at least 0.")
    if workers < 0:
        raise UserError(f"Got --workers={workers}, expected a number of threads, or 0 for this process's share of the cores.")
    if not 0 <= val_fraction < 1:
        raise UserError(f"Got --val_fraction={val_fraction}, expected a share in [0, 1), such as 0.01.")


def _check_pairs(
    val_source: str | None,
    val_labels: str | None,
    val_fraction: float,
    reference: bool,
    extractor: str,
    extractor_weights: str | None,
) -> None:
    """Refuse options that exclude each other, or have no effect without another."""
    if val_source is not None and val_fraction:
        raise UserError("Got --val_source and --val_fraction, expected one of them. Leave one out.")
    if val_labels is not None and val_source is None:
        raise UserError("Got --val_labels without --val_source, whose images they are for. Give both, or none.")
    if not reference and (extractor != INCEPTION or extractor_weights is not None):
        raise UserError(
            "Got --extractor or --extractor_weights without --reference=true, which they are for. Give it, or none."
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _where(source: str | None) -> str | None:
    return None if source is None else os.path.realpath(os.path.expanduser(source))


def _extractor(name: str, weights: str | None, shape: tuple[int, ...]) -> Extractor:
    made = Extractor(name, weights=weights)
    made.features(torch.zeros(shape, dtype=torch.uint8))  # refuses pictures of another size before anything is written
    return made


def _scorer_id(scorer: Extractor | None, weights: str | None) -> str | None:
    if scorer is None:
        return None
    digest = f"@{hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:16]}" if weights is not None else ""
    return f"{scorer.name} {scorer.layer}{digest}"


def _say_first(todo: Plan, form: Form, out: Path, shard_size: int) -> None:
    shown: set[int] = set()
    for plan in todo.splits:
        classes = plan.source.class_names
        print(f"{plan.name}: {len(plan.samples):,} images, {len(classes):,} classes")
        for note in () if id(plan.source) in shown else plan.source.notes:
            print(f"  {note}")
        shown.add(id(plan.source))
    if len(todo.splits[0].source.class_names) == 1:
        print("warning: all images are of one class; was a folder per class meant?")
    total = shards_of(todo.splits, shard_size)
    if todo.whole:
        print(f"{out} is whole already: nothing to do.")
        return
    if len(todo.splits) == 1:
        print("no validation split: give --val_source or --val_fraction if training is to have one")
    rows = sum(len(plan.samples) for plan in todo.splits) * (2 if form.info.flip else 1)
    size = rows * prod(form.info.stored_shape) * np.dtype(form.info.dtype).itemsize
    print(f"{len(total) - len(todo.missing):,} of {len(total):,} shards are done; all take {size / 1e9:,.2f} GB in {out}")


def _work(
    todo: Plan,
    target: Target,
    out: EncodeOut,
    processes: Processes,
    shard_size: int,
    batch_size: int,
    workers: int,
    stop: bool,
) -> None:
    """Make this process's shards, the missing ones are dealt in turn, and wait for those of the others."""
    splits = {plan.name: plan for plan in todo.splits}
    tasks = []
    for name, number in todo.missing:
        first = number * shard_size
        tasks.append(Task(splits[name], number, first, min(shard_size, len(splits[name].samples) - first)))
    total = sum(task.count for task in tasks)
    with tqdm(total=total, desc="Encoding", unit="image", disable=processes.rank != 0) as bar:

        def progress(count: int) -> None:
            bar.update(processes.counted(count) - bar.n)

        encode_shards(
            tasks[processes.rank :: processes.world],
            target,
            out,
            batch_size=batch_size,
            workers=workers,
            stop_at_unreadable=stop,
            progress=progress,
        )
        processes.wait_for_all(lambda: progress(0))


def _finish(out: EncodeOut, info: DatasetInfo, todo: Plan, shard_size: int, about: dict | None, stop: bool) -> None:
    """Join the shards and print counts that add up."""
    shards = Counter(name for name, _ in shards_of(todo.splits, shard_size))
    whole = replace(info, class_names=todo.splits[0].source.class_names)
    counts = out.finish(whole, shards, about, stop_at_unreadable=stop)
    for plan in todo.splits:
        found, written, lost = (counts.pop(f"{plan.name} {what}") for what in ("found", "written", "unreadable"))
        listed = f" (listed in {out.path / UNREADABLE_FILE})" if lost else ""
        print(f"{plan.name}: {found:,} images = {written:,} encoded + {lost:,} unreadable{listed}")
    for trait, count in sorted(counts.items()):
        print(f"  {count:,} {trait}")
    print(f"Wrote {out.path}; look at it with `python -m mf_lightning verify {out.path}`")
