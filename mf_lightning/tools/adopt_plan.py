"""What `adopt` makes of another project's latents: splits, and what the data set says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mf_lightning.data.foreign import Source
from mf_lightning.data.shards import DatasetInfo
from mf_lightning.tools.held_out import hold_out
from mf_lightning.types import UserError


@dataclass(frozen=True)
class Part:
    """One split to write."""

    split: str
    source: Source
    order: np.ndarray
    """Numbers of the source's samples, in the order of writing."""


def make_parts(train: Source, val: Source | None, val_fraction: float, shuffle_seed: int | None) -> list[Part]:
    """Return the splits, each with its samples in order; the arguments are those of the command.

    Raises:
        UserError: validation latents unlike the training ones, or a split without any.
    """
    orders = [np.arange(len(train))]
    if val is not None:
        for what in ("shape", "dtype", "flip", "class_names"):
            if getattr(val, what) != getattr(train, what):
                raise UserError(
                    f"Got {what} = {getattr(val, what)} in --val_source, expected {getattr(train, what)} as in SOURCE. Give "
                    "the validation latents of the same preparation."
                )
        orders.append(np.arange(len(val)))
    elif val_fraction:
        orders = list(hold_out(len(train), val_fraction))
    if shuffle_seed is not None:
        orders = [np.random.default_rng(shuffle_seed).permutation(order) for order in orders]
    return [Part(*one) for one in zip(("train", "val"), (train, val or train), orders, strict=False)]


def describe(
    kind: str,
    source: Source,
    autoencoder: str | None,
    scale: float | None,
    shift: float | None,
    image_size: int | None,
    classes: str | None,
    dtype: str | None,
) -> DatasetInfo:
    """Return the description of the data set, without its splits; the arguments are those of the command.

    Raises:
        UserError: facts that are missing, or that do not fit.
    """
    return DatasetInfo(
        kind="latents" if source.holds == "latents" else "moments",
        latent_shape=_latent_shape(source),
        dtype=str(np.dtype(dtype) if dtype else _dtype(source)),
        flip=source.flip,
        class_names=_class_names(source, classes),
        **_facts(kind, source, autoencoder, scale, shift, image_size),
    )


def _facts(
    kind: str, source: Source, autoencoder: str | None, scale: float | None, shift: float | None, image_size: int | None
) -> dict[str, Any]:
    """Return what the files do not tell: from the options, from the autoencoder, or from the project's preparation."""
    known, factor = {}, None
    if autoencoder is None and source.facts is not None:
        facts = source.facts
        known, factor = {"autoencoder": facts.autoencoder, "scale": facts.scale, "shift": facts.shift}, facts.factor
    elif autoencoder == "pixel":
        known, factor = {"autoencoder": "pixel", "scale": 1.0, "shift": 0.0}, 1
    elif autoencoder is not None and (Path(autoencoder).is_dir() or autoencoder.startswith("mf_lightning:")):
        from mf_lightning.autoencoders import KLAutoencoder

        loaded = KLAutoencoder(autoencoder)
        known = {"autoencoder": loaded.id, "scale": loaded.scale, "shift": loaded.shift}
        factor = 2 ** (len(loaded.net.config.block_out_channels) - 1)
    elif autoencoder is not None:
        known = {"autoencoder": autoencoder}
    if factor is not None:
        known["image_size"] = factor * source.shape[-2]
    asked = {"scale": scale, "shift": shift, "image_size": image_size}
    known |= {key: value for key, value in asked.items() if value is not None}
    sizes = ("scale", "a number other than 0"), ("shift", "a number"), ("image_size", "pixels, at least 1")
    for key, expected in sizes:
        value = known.get(key, 1)
        if not np.isfinite(value) or (key == "scale" and value == 0) or (key == "image_size" and value < 1):
            raise UserError(f"Got --{key} {value}, expected {expected}. Correct it.")
    missing = [f"--{key}" for key in ("autoencoder", *asked) if key not in known]
    if missing:
        raise UserError(
            f"Got the kind {kind} with --autoencoder {autoencoder}, expected {', '.join(missing)} as well: the files do not "
            "tell. Give them, or give a local directory of the autoencoder in diffusers' layout, which tells them."
        )
    return known


def _latent_shape(source: Source) -> tuple[int, int, int]:
    channels, height, width = source.shape
    if source.holds == "latents":
        return channels, height, width
    if channels % 2:
        raise UserError(
            f"Got {channels} channels in {source.name(0)}, expected an even number: mean and spread of each. Check KIND."
        )
    return channels // 2, height, width


def _dtype(source: Source) -> np.dtype:
    if source.dtype == np.float64:
        raise UserError(
            f"Got float64 in {source.name(0)}, expected a choice of what to store. Give --dtype float32 or float16."
        )
    return source.dtype


def _class_names(source: Source, classes: str | None) -> tuple[str, ...]:
    if classes is None:
        if source.class_names is None:
            raise UserError(
                "Got no --classes, expected the number of classes (1000 for ImageNet), 0 for none, or a file with one name per "
                "line: the files do not tell."
            )
        return source.class_names
    if classes.isdecimal():
        names = tuple(map(str, range(int(classes))))
    elif Path(classes).is_file():
        names = tuple(line.strip() for line in Path(classes).read_text().splitlines() if line.strip())
    else:
        raise UserError(f"Got --classes {classes}, expected a number, or a file with one class name per line.")
    if source.class_names is not None and len(names) != len(source.class_names):
        raise UserError(
            f"Got --classes with {len(names):,} names, expected {len(source.class_names):,}, one for each class folder. Leave "
            "--classes out to take the folders' names."
        )
    return names
