"""What `encode` makes of its sources: splits, shards and the form of the data set."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import PIL
import torch

from mf_lightning.autoencoders import KLAutoencoder, PixelAutoencoder
from mf_lightning.data.images import ImageSource, open_images
from mf_lightning.data.shards import DatasetInfo
from mf_lightning.tools.encode_shards import SplitPlan
from mf_lightning.tools.held_out import hold_out
from mf_lightning.types import UserError


@dataclass(frozen=True)
class Plan:
    """What the first process finds out, and all work by."""

    splits: list[SplitPlan]
    missing: list[tuple[str, int]]
    """Split and number of the shards to make."""
    whole: bool
    """Whether the data set is complete already."""


@dataclass(frozen=True)
class Form:
    """What the autoencoder decides about the data set."""

    info: DatasetInfo
    """Without classes and splits."""
    channels: int
    """Of pictures: 3 for RGB, 1 for grey."""


def form_of(model: KLAutoencoder | PixelAutoencoder, size: int, dtype: str, flip: bool) -> Form:
    """Return what an autoencoder makes of images of a size.

    Raises:
        UserError: a dtype, size or autoencoder that does not fit.
    """
    if dtype not in ("float16", "float32"):
        raise UserError(f"Got --dtype={dtype}, expected float16 or float32.")
    kind, factor, (channels, stored) = "latents", 1, (3, 3)
    if isinstance(model, KLAutoencoder):
        kind, factor, (channels, stored) = "moments", model.factor, model.channels
    if size % factor:
        raise UserError(
            f"Got --image_size={size} for an autoencoder that makes one latent of {factor} x {factor} pixels, expected a "
            f"multiple of {factor}. Give {max(1, round(size / factor)) * factor}."
        )
    if channels not in (1, 3):
        raise UserError(f"Got an autoencoder of pictures with {channels} channels, expected 3 (RGB) or 1 (grey). Give another.")
    shape = (stored, size // factor, size // factor)
    info = DatasetInfo(kind, shape, dtype, flip, model.id, model.scale, model.shift, size, ())
    return Form(info, channels)


def make_splits(
    source: str,
    labels: str | None,
    val_source: str | None,
    val_labels: str | None,
    follow_links: bool,
    val_fraction: float,
    shuffle_seed: int | None,
) -> list[SplitPlan]:
    """Return the splits, each with its samples in order; the arguments are those of the command.

    Raises:
        UserError: what sources and labels refuse, a split without images, or classes that differ.
    """
    images = open_images(source, labels=labels, follow_links=follow_links)
    everything = np.arange(len(images))
    if val_source is not None:
        val = open_images(val_source, labels=val_labels, follow_links=follow_links)
        plans = [SplitPlan("train", images, everything, images.labels)]
        plans.append(SplitPlan("val", val, np.arange(len(val)), _same_classes(val, images)))
    elif val_fraction:
        parts = zip(("train", "val"), hold_out(len(images), val_fraction), strict=True)
        plans = [SplitPlan(name, images, samples, images.labels[samples]) for name, samples in parts]
    else:
        plans = [SplitPlan("train", images, everything, images.labels)]
    return plans if shuffle_seed is None else [_shuffled(plan, shuffle_seed) for plan in plans]


def _shuffled(plan: SplitPlan, seed: int) -> SplitPlan:
    if not plan.source.any_order:
        raise UserError(
            "Got --shuffle_seed for compressed tars or parquet files, which can only be read in order, expected a folder, a "
            "zip file or plain tars. Leave it out, or unpack the tars' compression."
        )
    order = np.random.default_rng(seed).permutation(len(plan.samples))
    return SplitPlan(plan.name, plan.source, plan.samples[order], plan.labels[order])


def _same_classes(val: ImageSource, train: ImageSource) -> np.ndarray:
    """Return the validation images' labels by the training images' numbers of classes."""
    number = {name: k for k, name in enumerate(train.class_names)}
    unknown = [name for name in val.class_names if name not in number]
    if unknown or bool(val.class_names) != bool(train.class_names):
        first = f", the first is {unknown[0]!r}" if unknown else ""
        raise UserError(
            f"Got {len(val.class_names):,} classes in --val_source, {len(unknown):,} of which SOURCE does not have{first}, "
            f"expected classes among its {len(train.class_names):,}. Give images of the same classes, or --val_labels."
        )
    return np.array([number[name] for name in val.class_names], np.int64)[val.labels] if val.class_names else val.labels


def settings_of(form: Form, splits: list[SplitPlan]) -> dict[str, Any]:
    """Return what decides every byte of the result, apart from the kind of device."""
    info = form.info
    images = {plan.name: f"{len(plan.samples)} images, {plan.source.fingerprint()}" for plan in splits}
    return {
        "image_size": info.image_size,
        "autoencoder": info.autoencoder,
        "scale": info.scale,
        "shift": info.shift,
        "dtype": info.dtype,
        "flip": info.flip,
        "images": images,
        "versions": f"Pillow {PIL.__version__}, torch {torch.__version__}",  # others may round otherwise
    }


def shards_of(splits: list[SplitPlan], shard_size: int) -> list[tuple[str, int]]:
    """Return split and number of every shard."""
    return [(plan.name, number) for plan in splits for number in range(ceil(len(plan.samples) / shard_size))]
