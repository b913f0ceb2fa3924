"""LatentDataModule: batches of latents for training, the way back to pictures for evaluation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from mf_lightning import draws
from mf_lightning.data.loader import EvalLoader, LatentSplit, TrainLoader
from mf_lightning.data.places import open_place
from mf_lightning.data.shards import DatasetInfo
from mf_lightning.data.subset import HELD_OUT, Subset
from mf_lightning.draws import Stream
from mf_lightning.pixels import to_uint8
from mf_lightning.transfer import to_device
from mf_lightning.types import Autoencoder, LatentBatch, LatentSpec, UserError


class LatentData(LightningDataModule):
    """What every source of latents shares; subclasses say where the rows come from.

    Args:
        info: description of the data, as ``dataset.json`` holds it.
        autoencoder: turns latents into pictures; null trains without any evaluation that needs pictures.
        batch_size: rows per optimizer step over all devices and accumulated batches.
        eval_batch_size: validation rows per device.
        val_split: split that validation reads.
        seed: decides order, mirroring and the sampling of moments.
        workers: threads that make batches ahead; null is one on a GPU and none elsewhere.
    """

    def __init__(
        self,
        info: DatasetInfo,
        autoencoder: Autoencoder | None,
        *,
        batch_size: int,
        eval_batch_size: int,
        val_split: str,
        seed: int,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        for split in ("train", val_split):
            if split not in info.splits:
                raise UserError(
                    f"Got a data set with the splits {', '.join(info.splits)}, expected '{split}' among them. Set "
                    "data.val_split to one of them, or prepare the data with that split."
                )
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise UserError(f"Got data.{name} = {value}, expected at least 1.")
        if workers is not None and workers < 0:
            raise UserError(f"Got data.workers = {workers}, expected 0 or more threads, or null.")
        self.info, self.subset = info, Subset()
        self.autoencoder = autoencoder
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_split = val_split
        self.seed = seed
        self.workers = workers
        self._splits: dict[str, LatentSplit] = {}

    @property
    def latent_spec(self) -> LatentSpec:
        """Latent shape and class count, for the network."""
        return LatentSpec(self.info.latent_shape, len(self.info.class_names))

    @abstractmethod
    def load_split(self, name: str) -> LatentSplit:
        """Return the rows of a split."""

    def split(self, name: str) -> LatentSplit:
        """Return the rows of a split, opened once."""
        if name not in self._splits:
            self._splits[name] = self.load_split(name)
        return self._splits[name]

    def setup(self, stage: str) -> None:
        """Open the splits and compare autoencoders before anything runs."""
        if self.autoencoder is not None and not same_autoencoder(self.autoencoder.id, self.info.autoencoder):
            raise UserError(
                f"Got the autoencoder {self.autoencoder.id}, expected {self.info.autoencoder}, which made these latents. "
                "Set data.autoencoder to that one, or encode the images again."
            )
        if stage == "fit" and self.split("train") and self.trainer is not None:
            self._check_limit()
        self.split(self.val_split)

    def _check_limit(self) -> None:
        limit, parts = self.trainer.limit_train_batches, self.trainer.accumulate_grad_batches
        if (batches := limit if isinstance(limit, int) else int(limit * self.steps_per_epoch * parts)) % parts:
            raise UserError(
                f"Got trainer.limit_train_batches = {limit} ({batches} batches), trainer.accumulate_grad_batches = {parts}, "
                "expected whole optimizer steps: the rest of a step's rows would never be seen. Give a multiple."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole optimizer steps in one pass over the training split."""
        return len(self.split("train")) // self.batch_size

    def state_dict(self) -> dict[str, int | str]:
        """Return what decides which samples a step number stands for; stored in every checkpoint."""
        split = self.split("train") if "train" in self._splits else None
        if split is None:
            return {}
        window = {} if split.window is None else {"shuffle_window": split.window}
        return {"samples": len(split), "batch_size": self.batch_size, "seed": self.seed, **window}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Refuse to resume on a stream of other samples, which would repeat some and leave some out.

        Raises:
            UserError: naming what differs.
        """
        ours = self.state_dict()
        if self.trainer.training and ours != state:
            differ = [key for key in {**state, **ours} if ours.get(key) != state.get(key)]
            got, expected = (", ".join(f"{key} = {values.get(key)}" for key in differ) for values in (ours, state))
            raise UserError(
                f"Got training data with {got}, expected the checkpoint's {expected}: a resumed run goes on at step x "
                "batch_size of one stream of samples. Give it the same data, data.init_args.batch_size and seed (any number of "
                "devices will do), or start a new run."
            )

    def train_dataloader(self) -> TrainLoader:
        """Return this device's share of the endless training stream, from the trainer's optimizer step on."""
        trainer = self.trainer
        return TrainLoader(
            self.split("train"),
            global_batch_size=self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            start_step=lambda: trainer.global_step,
            **self._hands("train"),
        )

    def _hands(self, split: str) -> dict[str, Any]:
        """Return how batches are made: on a GPU ahead and in pinned memory; on a CPU a thread would take the network's time."""
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        default = 1 if on_gpu or self.split(split).remote is not None else 0
        return {"workers": default if self.workers is None else self.workers, "pinned": on_gpu}

    def val_dataloader(self) -> EvalLoader:
        """Return the validation split, each sample on one device."""
        trainer = self.trainer
        return EvalLoader(
            self.split(self.val_split),
            batch_size=self.eval_batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            **self._hands(self.val_split),
        )

    def test_dataloader(self) -> EvalLoader:
        """Return the validation split: `test` scores generated images, the loss beside it is that of validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[int]:
        """Return one empty turn: what `predict` writes is decided by its callback, not by data."""
        return [0]

    def transfer_batch_to_device(self, batch: LatentBatch, device: torch.device, dataloader_idx: int) -> LatentBatch:
        """Move latents and labels; numbers of samples and rows stay on the CPU, where draws are decided."""
        if not isinstance(batch, LatentBatch):
            return batch
        return batch._replace(x=to_device(batch.x, device), y=to_device(batch.y, device))

    def on_after_batch_transfer(self, batch: LatentBatch, dataloader_idx: int) -> LatentBatch:
        """Sample latents from moments, on the device, and scale them: stored values => network input."""
        if not isinstance(batch, LatentBatch):
            return batch
        training = self.trainer.training
        stream, rows = (Stream.MOMENTS, batch.row) if training else (Stream.VAL_MOMENTS, batch.index)
        step = self.trainer.global_step if training else 0
        return batch._replace(x=self.to_latents(batch.x, stream=stream, step=step, rows=rows))

    def to_latents(self, stored: Tensor, *, stream: Stream, step: int, rows: Tensor) -> Tensor:
        """Return scaled latents, (B, C, h, w) float32 (float64 of float64), of stored moments or latents.

        Args:
            stored: (B, 2C, h, w) moments, sampled as ``mean + std * normal``, or (B, C, h, w) latents.
            stream: which draws.
            step: optimizer step, 0 outside training.
            rows: decides each row's draw, (B,) int64.
        """
        z = stored.to(torch.promote_types(stored.dtype, torch.float32))
        if self.info.kind == "moments":
            mean, std = z.chunk(2, dim=1)
            shape = mean.shape[1:]
            z = mean + std * draws.normal(
                self.seed, stream, step=step, rows=to_device(rows, z.device), shape=shape, dtype=z.dtype
            )
        return (z - self.info.shift) * self.info.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 pictures, (B, c, H, W), of scaled latents, (B, C, h, w).

        Raises:
            UserError: no autoencoder is configured.
        """
        if self.autoencoder is None:
            raise UserError("Got no autoencoder, expected one to make pictures of latents. Set data.autoencoder.")
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return to_uint8(self.autoencoder.to(latents.device).decode(latents / self.info.scale + self.info.shift))

    def decoded_split(
        self, name: str, *, device: torch.device, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 pictures, (B, c, H, W), and sample numbers, (B,), of a split, in order: those of this process, or all."""
        for batch in EvalLoader(self.split(name), batch_size=batch_size, rank=rank, world_size=world_size):
            if batch.row[0] < 0:  # this process has run out
                return
            z = self.to_latents(batch.x.to(device), stream=Stream.VAL_MOMENTS, step=0, rows=batch.index)
            yield self.decode(z), batch.index


def same_autoencoder(one: str, other: str) -> bool:
    """Tell whether two ids name one autoencoder: by checksum where both have one, else by name, a hub's without the owner."""
    (one_name, _, one_sum), (other_name, _, other_sum) = one.partition("@"), other.partition("@")
    if one_sum and other_sum:
        return one_sum == other_sum
    return one_name == other_name or (bool(one_sum or other_sum) and one_name.split("/")[-1] == other_name.split("/")[-1])


class LatentDataModule(LatentData):
    """Pre-encoded latents (see ``mf_lightning.data.shards`` for the format): a directory, memory-mapped, or a URL, streamed.

    Args:
        path: directory with ``dataset.json``, or its URL in any protocol of fsspec (s3://, gs://, hf://, https://, file://).
        autoencoder: the one that made the latents; null trains without any evaluation that needs pictures.
        batch_size: rows per optimizer step over all devices and accumulated batches.
        eval_batch_size: validation rows per device.
        val_split: split that validation reads.
        checksums: also read every shard of a directory once at the start and compare checksums; those of a URL always are.
        seed: decides order, mirroring and the sampling of moments.
        workers: threads that make batches ahead; null is one on a GPU or for a URL, and none elsewhere.
        shuffle_window: shards whose rows are shuffled together, the shards being shuffled per epoch; null shuffles all rows of
            a directory together, and 8 shards of a URL.
        subset: which rows train and validate; null takes all.
        cache_dir: folder for fetched shards, which processes and jobs may share; null is in the user's cache folder.
        cache_size: GB that they may take; at least two windows of shards.
        storage_options: of the URL's file system, as fsspec takes them.
        fetch_retries: how often a file is fetched again after a failure.
        fetch_timeout: seconds without progress after which a connection is given up.
    """

    def __init__(
        self,
        path: str,
        autoencoder: Autoencoder | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        val_split: str = "val",
        checksums: bool = False,
        seed: int = 0,
        workers: int | None = None,
        shuffle_window: int | None = None,
        subset: Subset | None = None,
        cache_dir: str | None = None,
        cache_size: float = 20.0,
        storage_options: dict[str, Any] | None = None,
        fetch_retries: int = 5,
        fetch_timeout: float = 60.0,
    ) -> None:
        self.place = open_place(
            path,
            window=shuffle_window,
            cache_dir=cache_dir,
            cache_size=cache_size,
            storage_options=storage_options,
            fetch_retries=fetch_retries,
            fetch_timeout=fetch_timeout,
        )
        if checksums and self.place.remote:
            raise UserError(
                f"Got data.init_args.checksums = true for '{path}', expected false: files of a URL are checked when fetched."
            )
        subset = Subset() if subset is None else subset
        held_out = subset.holds_out(val_split)
        super().__init__(
            self.place.info,
            autoencoder,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_split="train" if held_out else val_split,
            seed=seed,
            workers=workers,
        )
        self.subset = subset
        if held_out:
            self.val_split = HELD_OUT
        self.path = path
        self.checksums = checksums

    def load_split(self, name: str) -> LatentSplit:
        """Return the rows of a split: all of it, or those of the subset."""
        training, held_out = name == "train", name == HELD_OUT
        window = self.place.window if training else None
        stored = "train" if held_out else name
        rows = None
        if not self.subset.takes_all:
            of = (self.place.labels(stored), self.info.class_names)
            rows = self.subset.training_rows(*of) if training else self.subset.validation_rows(*of, held_out=held_out)
        shards = self.place.shards(stored, checksums=self.checksums, window=window or 1)
        return LatentSplit(shards, rows=rows, window=window)

    def state_dict(self) -> dict[str, int | str]:
        """Return what decides which samples a step number stands for; stored in every checkpoint."""
        state = super().state_dict()
        return state if not state or self.subset.takes_all else {**state, "subset": self.subset.describe()}
