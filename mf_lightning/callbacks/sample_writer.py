"""Export of samples: `predict` writes N images for others' suites, and goes on where it was killed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from mf_lightning.callbacks.generate import LabelScheme, choose_labels, find_ema, generate
from mf_lightning.callbacks.sample_files import NPZ_FILE, NpzFiles, PngFiles, SampleFiles, aside_of
from mf_lightning.flow.sampler import AverageSampler, Sampler, check_nfe
from mf_lightning.pixels import ROUNDING
from mf_lightning.sharding import gathered
from mf_lightning.types import UserError

T = TypeVar("T")
FILES = {"png": PngFiles, "npz": NpzFiles}
SETTINGS_FILE, LABELS_FILE = "samples.json", "labels.csv"
PATIENCE = 30
"""Seconds until what other processes wrote must be seen: network file systems show an older state for a while."""


class SampleWriter(Callback):
    """What `predict` does: write N images and ``labels.csv`` to a folder; image i depends on (seed, i) only.

    Images are made in batches of fixed numbers, whatever the number of processes, so that a call that was killed and given
    again, also with other devices, writes the bytes of one that was not. ``samples.json`` keeps what the images depend on; a
    folder is only ever continued with the same.

    Args:
        num_samples: images to write.
        num_steps: jumps of the sampler, each one network pass.
        batch_size: images at a time on each device.
        labels: "balanced" (image i has class i mod K), "uniform" (drawn by seed and i), or a list of classes taken in turn.
        seed: with an image's number it decides noise and label.
        folder: where to; null is ``samples`` in ``trainer.default_root_dir``. All processes must see it.
        format: "png" (``000000.png``, ...; grey stays grey) or "npz" (``samples.npz`` as ADM's evaluator reads it: ``arr_0``
            uint8 NHWC, grey repeated to RGB, and labels as ``arr_1``).
        overwrite: remove the images that an earlier call left in the folder.
        sampler: how a jump is made; null is AverageSampler, EulerSampler is for flow matching.
    """

    def __init__(
        self,
        num_samples: int = 64,
        num_steps: int = 1,
        batch_size: int = 64,
        labels: LabelScheme | list[int] = "balanced",
        seed: int = 0,
        folder: str | None = None,
        format: Literal["png", "npz"] = "png",
        overwrite: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        check_nfe("sample_writer.num_steps", [num_steps])
        if num_samples < 1 or batch_size < 1:
            raise UserError(
                f"Got sample_writer.num_samples = {num_samples}, batch_size = {batch_size}, expected at least 1 of each."
            )
        if format not in FILES:
            raise UserError(f"Got sample_writer.format = {format!r}, expected one of {', '.join(FILES)}.")
        self.num_samples = num_samples
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.labels = labels
        self.seed = seed
        self.folder = folder
        self.format = format
        self.overwrite = overwrite
        self.sampler = sampler or AverageSampler()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the images that are missing, a batch on each process in turn, and join them."""
        folder = Path(self.folder or Path(trainer.default_root_dir) / "samples")
        files: SampleFiles = FILES[self.format](folder)
        choose_labels(self.labels, torch.arange(1), num_classes=pl_module.net.y_null or 0, seed=self.seed)  # or it raises
        if trainer.datamodule.autoencoder is None:
            raise UserError("Got data.autoencoder = null for `predict`, expected one to make pictures. Set data.autoencoder.")
        settings = self.settings(trainer, pl_module)
        present = _from_first(trainer, lambda: self._begin(folder, files, settings))
        try:
            self._write_missing(trainer, pl_module, files, present)
        except OSError as error:
            raise _lost(folder, error) from error
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self._finish(folder, files, pl_module.net.y_null or 0)
        trainer.strategy.barrier()

    def settings(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return everything that the images depend on; every process calls it."""
        ema = find_ema(trainer)
        with ema.applied(pl_module, ema.use):
            weights = weights_checksum(pl_module.net.state_dict(), keep=trainer.is_global_zero)
        return {
            "format": self.format,
            "num_samples": self.num_samples,
            "num_steps": self.num_steps,
            "sampler": self.sampler.name,
            "seed": self.seed,
            "labels": self.labels if pl_module.net.y_null or not isinstance(self.labels, str) else "none",
            "weights": weights,
            "ema": ema.use,
            "net": pl_module.net.config,
            "autoencoder": None if trainer.datamodule.autoencoder is None else trainer.datamodule.autoencoder.id,
            "precision": str(trainer.precision),
            "rounding": ROUNDING,
        }

    def _begin(self, folder: Path, files: SampleFiles, settings: dict[str, Any]) -> np.ndarray:
        """Take the folder over and return which images are there, (N,) bool.

        Raises:
            UserError: it holds other images.
        """
        file = folder / SETTINGS_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.overwrite:
                for kind in FILES.values():
                    kind(folder).remove()
                file.unlink(missing_ok=True)
            settings = json.loads(json.dumps(settings))
            _check_folder(folder, settings)
            for left in [*folder.glob(".*.tmp"), *folder.glob(".parts/.*.tmp")]:
                left.unlink()
            _write(file, (json.dumps(settings, indent=1) + "\n").encode())
            present = files.present(self.num_samples)
        except OSError as error:
            raise _lost(folder, error) from error
        if present.any():
            print(f"{present.sum():,} of {self.num_samples:,} images are in {folder} already")
        return present

    def _write_missing(self, trainer: Trainer, pl_module: LightningModule, files: SampleFiles, present: np.ndarray) -> None:
        size = min(self.batch_size, self.num_samples)
        index, mine = shares(present, size, rank=trainer.global_rank, processes=trainer.world_size)
        if not len(index):
            return
        batches = generate(
            trainer,
            pl_module,
            index,
            num_steps=self.num_steps,
            ema=find_ema(trainer).use,
            seed=self.seed,
            labels=self.labels,
            batch_size=size,
            sampler=self.sampler,
        )
        try:
            for first, images in zip(mine, batches, strict=True):
                if first is not None:
                    files.write(images.pixels[: self.num_samples - first], first, present)
        finally:
            files.flush()

    def _finish(self, folder: Path, files: SampleFiles, num_classes: int) -> None:
        """Join what all processes wrote; labels stand beside it."""
        index = torch.arange(self.num_samples)
        labels = choose_labels(self.labels, index, num_classes=num_classes, seed=self.seed)
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["index", "label"])
        writer.writerows([] if labels is None else enumerate(labels.tolist()))
        limit = time.monotonic() + PATIENCE
        while not (there := files.present(self.num_samples)).all():
            if time.monotonic() > limit:
                raise UserError(
                    f"Got {int(there.sum()):,} of {self.num_samples:,} images in '{folder}', expected those of all processes. "
                    "Give a folder that every node sees as sample_writer.folder."
                )
            time.sleep(0.5)
        try:
            _write(folder / LABELS_FILE, table.getvalue().encode())
            what = files.finish(self.num_samples, None if labels is None else labels.numpy())
        except OSError as error:
            raise _lost(folder, error) from error
        print(f"Wrote {self.num_samples:,} images at {self.num_steps} NFE and {LABELS_FILE} to {folder}: {what}")


def shares(present: np.ndarray, size: int, *, rank: int, processes: int) -> tuple[Tensor, list[int | None]]:
    """Return the numbers of the images that all processes make, as ``generate`` deals them, and the first of each of this
    process's batches (None for one that only keeps it in step with the others).

    Batch b holds images [b size, (b + 1) size), filled up with the last one, so that what is computed together depends neither
    on processes nor on what is present.

    Args:
        present: which images are there, (N,) bool.
        size: images of a batch.
        rank: of this process.
        processes: their number.
    """
    count = len(present)
    todo = [first for first in range(0, count, size) if not present[first : first + size].all()]
    if not todo:
        return torch.empty(0, dtype=torch.int64), []
    dealt: list[int | None] = [*todo, *[None] * (-len(todo) % processes)]
    firsts = torch.tensor([todo[-1] if first is None else first for first in dealt])
    batches = (firsts[:, None] + torch.arange(size)).clamp(max=count - 1)  # (batches, size)
    index = batches.reshape(-1, processes, size).transpose(1, 2).flatten()  # index[rank::processes] is a process's batches
    return index, dealt[rank::processes]


def weights_checksum(state: dict[str, Tensor], *, keep: bool) -> str:
    """Return the first 16 digits of the SHA-256 over names and values, on processes that keep; all call it."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        whole = gathered(value, keep=keep)  # one tensor at a time
        if keep:
            digest.update(name.encode())
            digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix images of two checkpoints, seeds or settings in a folder.

    Raises:
        UserError: naming what differs.
    """
    file, how = folder / SETTINGS_FILE, "Give another sample_writer.folder, or --sample_writer.overwrite=true to start anew."
    if not file.exists():
        others = [*folder.glob("*.png"), *folder.glob(NPZ_FILE)]
        if others:
            raise UserError(
                f"Got the folder '{folder}', which holds {min(others).name} without {SETTINGS_FILE}, expected none. {how}"
            )
        return
    try:
        begun = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"Got '{file}', which cannot be read ({error}), expected what an earlier call wrote. {how}") from error
    differ = [key for key in {**begun, **settings} if begun.get(key) != settings.get(key)]
    if differ:
        got, expected = (", ".join(f"{key} = {values.get(key)}" for key in differ) for values in (settings, begun))
        raise UserError(f"Got {got} for '{folder}', expected {expected}, with which its images were begun. {how}")


def _from_first(trainer: Trainer, make: Callable[[], T]) -> T:
    """Return what the first process makes; where it fails with a UserError, all do."""
    box: list[Any] = [None, None]
    if trainer.is_global_zero:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = error
    box = trainer.strategy.broadcast(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _write(file: Path, content: bytes) -> None:
    aside = aside_of(file)
    aside.write_bytes(content)
    aside.replace(file)


def _lost(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"Got a file in '{folder}' that could not be written ({error.strerror or error}), expected space and the right to "
        "write. Finished images are kept: free some space, then give the same command again."
    )
