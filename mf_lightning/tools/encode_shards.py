"""Decoding, encoding and writing at once: threads decode ahead, this thread encodes, one thread writes.

What a shard holds is a function of its images and the settings alone: batches never reach over a shard's end, and an
image that cannot be read leaves its shard shorter without moving others.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from mf_lightning.data.crop import Picture, read_picture
from mf_lightning.data.images import ImageSource, Unreadable
from mf_lightning.metrics.extractor import Extractor
from mf_lightning.pixels import from_uint8
from mf_lightning.tools.encode_out import EncodedShard, EncodeOut
from mf_lightning.transfer import to_device
from mf_lightning.types import Autoencoder, UserError

WRITES_AHEAD = 2
"""Encoded shards that may wait for the disk."""


@dataclass(frozen=True)
class SplitPlan:
    """Which images of which source make a split, in order."""

    name: str
    source: ImageSource
    samples: np.ndarray
    """Numbers of the images within the source, (N,)."""
    labels: np.ndarray
    """(N,) int64, as the data set numbers classes."""


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    split: SplitPlan
    number: int
    first: int
    """Number of its first sample within the split."""
    count: int


@dataclass(frozen=True)
class Target:
    """What images are turned into."""

    autoencoder: Autoencoder
    device: torch.device
    size: int
    channels: int
    dtype: str
    flip: bool
    extractor: Extractor | None
    """Makes features of the training split's pictures; None makes none."""

    def encode(self, pixels: torch.Tensor) -> np.ndarray:
        """Return what is stored, (B, ...), of uint8 pixels, (B, c, H, W)."""
        values = self.autoencoder.encode(from_uint8(pixels)).float().cpu().numpy()
        with np.errstate(over="ignore"):  # what overflows is looked for, and named, by the caller
            return values.astype(self.dtype)


def encode_shards(
    tasks: Sequence[Task],
    target: Target,
    out: EncodeOut,
    *,
    batch_size: int,
    workers: int,
    stop_at_unreadable: bool,
    progress: Callable[[int], None],
) -> None:
    """Make the shards of this process.

    Args:
        tasks: the shards.
        target: what to make of each picture.
        out: where to write.
        batch_size: images per call of the autoencoder.
        workers: threads that decode.
        stop_at_unreadable: end at the first image that cannot be read; else list it and go on.
        progress: told how many images were done.

    Raises:
        UserError: an image that cannot be read (unless skipped), values that the dtype cannot hold, or a full disk.
    """
    images = _decoded(tasks, target, workers, ahead=4 * batch_size + 2 * workers)
    with exact(), ThreadPoolExecutor(1, "write") as writer:
        waiting: list[Future] = []
        try:
            for task, group in groupby(images, key=lambda image: image[0]):
                shard = _encode_shard(task, group, target, batch_size, stop_at_unreadable, progress)
                while len(waiting) >= WRITES_AHEAD:
                    waiting.pop(0).result()
                waiting.append(writer.submit(out.write, shard))
        finally:
            images.close()
        for write in waiting:
            write.result()


def _encode_shard(
    task: Task,
    images: Iterator[tuple[Task, int, Picture | Unreadable]],
    target: Target,
    batch_size: int,
    stop_at_unreadable: bool,
    progress: Callable[[int], None],
) -> EncodedShard:
    split, unreadable, traits, rows = task.split, [], Counter(), []
    parts: dict[str, list[np.ndarray]] = {"latents": [], "flipped": [], "features": []}
    batch: list[np.ndarray] = []

    def flush() -> None:
        for key, value in _encode_batch(np.stack(batch), target, features=split.name == "train").items():
            if not np.isfinite(value).all():
                raise _not_finite(split, rows[-len(batch) :], value, target.dtype)
            parts[key].append(value)
        progress(len(batch))
        batch.clear()

    for _, sample, picture in images:
        if isinstance(picture, Unreadable):
            name = split.source.names[split.samples[sample]]
            if stop_at_unreadable:
                raise UserError(
                    f"Got the image {name!r}, which cannot be read ({picture}), expected a whole one. Repair or remove it, or "
                    "give --unreadable=skip to leave such images out and list them."
                )
            unreadable.append({"sample": sample, "name": name, "reason": str(picture)})
            progress(1)
            continue
        batch.append(picture.pixels)
        rows.append(sample)
        traits.update(picture.traits)
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    joined: dict[str, Any] = {key: np.concatenate(found) if found else None for key, found in parts.items()}
    if joined["features"] is None and target.extractor is not None and split.name == "train":
        joined["features"] = np.zeros((0, target.extractor.dim), np.float32)
    labels = split.labels[rows].astype(np.int64)
    return EncodedShard(
        split.name, task.number, task.count, labels=labels, unreadable=unreadable, traits=dict(sorted(traits.items())), **joined
    )


def _encode_batch(pictures: np.ndarray, target: Target, *, features: bool) -> dict[str, np.ndarray]:
    pixels = to_device(torch.from_numpy(pictures), target.device)  # (B, c, H, W) uint8
    found = {"latents": target.encode(pixels)}
    if target.flip:
        found["flipped"] = target.encode(pixels.flip(-1))
    if features and target.extractor is not None:
        found["features"] = target.extractor.features(pixels)[target.extractor.layer].float().cpu().numpy()
    return found


def _not_finite(split: SplitPlan, rows: Sequence[int], values: np.ndarray, dtype: str) -> UserError:
    bad = int(np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))[0])
    name = split.source.names[split.samples[rows[bad]]]
    return UserError(
        f"Got values of the image {name!r} that are not finite in {dtype}, expected finite ones. Give --dtype=float32, or "
        "check the autoencoder's weights."
    )


def _decoded(
    tasks: Sequence[Task], target: Target, workers: int, *, ahead: int
) -> Iterator[tuple[Task, int, Picture | Unreadable]]:
    """Yield each image of each task in order, decoded by threads up to ``ahead`` images before they are asked for."""
    line: queue.Queue = queue.Queue(ahead)
    ended = threading.Event()

    def hand_over(item: Any) -> None:
        while not ended.is_set():
            try:
                line.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def feed(pool: ThreadPoolExecutor) -> None:
        try:
            for task in tasks:
                source = task.split.source
                for sample in range(task.first, task.first + task.count):
                    if ended.is_set():
                        return
                    number = int(task.split.samples[sample])
                    content = None if source.any_order else _content(source, number)
                    hand_over((task, sample, pool.submit(_picture, source, number, content, target)))
            hand_over(None)
        except Exception as error:  # handed to the thread that waits for images, which raises it
            hand_over(error)

    with ThreadPoolExecutor(workers, "decode") as pool:
        feeder = threading.Thread(target=feed, args=(pool,), name="feed", daemon=True)
        feeder.start()
        try:
            while (item := line.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                task, sample, picture = item
                yield task, sample, picture.result()
        finally:
            ended.set()
            feeder.join()
            pool.shutdown(cancel_futures=True)


def _content(source: ImageSource, number: int) -> bytes | Unreadable:
    try:
        return source.read(number)
    except Unreadable as error:
        return error
    except OSError as error:
        raise UserError(
            f"Got the image {source.names[number]!r}, which the disk or network does not give ({error}), expected to read it. "
            "Finished shards are kept: give the same command again when it can be read."
        ) from error


def _picture(source: ImageSource, number: int, content: bytes | Unreadable | None, target: Target) -> Picture | Unreadable:
    content = _content(source, number) if content is None else content
    if isinstance(content, Unreadable):
        return content
    try:
        return read_picture(content, size=target.size, channels=target.channels)
    except Unreadable as error:
        return error


@contextmanager
def exact() -> Iterator[None]:
    """Compute in true float32 by kernels that give the same bits each time, and set back afterwards."""
    flags = ((torch.backends.cudnn, "allow_tf32", False), (torch.backends.cudnn, "deterministic", True),
             (torch.backends.cudnn, "benchmark", False), (torch.backends.cuda.matmul, "allow_tf32", False))  # fmt: skip
    before = [getattr(owner, name) for owner, name, _ in flags]
    try:
        for owner, name, value in flags:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(flags, before, strict=True):
            setattr(owner, name, value)
