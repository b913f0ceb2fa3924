"""`adopt`: another project's latents as a data set of this one, without encoding anything again."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from mf_lightning.data.aside import write_aside
from mf_lightning.data.checksum import file_checksum
from mf_lightning.data.foreign import Holds, Source, open_source
from mf_lightning.data.foreign.moments import to_stored
from mf_lightning.data.shards import (
    INFO_FILE,
    DatasetInfo,
    ShardInfo,
    check_labels,
    shard_file,
    write_info,
    write_shard,
)
from mf_lightning.types import UserError

PROGRESS = ".adopt"
"""Folder in OUT of an unfinished adoption: what is being adopted, and which shards are whole."""


@dataclass(frozen=True)
class Part:
    """One split to write."""

    split: str
    source: Source
    order: np.ndarray
    """Numbers of the source's samples, in the order of writing."""


def adopt(
    kind: Literal["repa", "meanflow", "mar", "lightningdit", "arrays"],
    source: Path,
    out: Path,
    val_source: Path | None = None,
    val_fraction: float = 0.0,
    classes: str | None = None,
    autoencoder: str | None = None,
    scale: float | None = None,
    shift: float | None = None,
    image_size: int | None = None,
    holds: Holds | None = None,
    dtype: Literal["float16", "float32"] | None = None,
    shard_size: int = 3200,
    shuffle_seed: int | None = None,
) -> None:
    """Write a data set of latents that another project made; killed and started again it goes on with the next shard.

    Args:
        kind: who wrote them: repa (also HaoyiZhu), meanflow (the official preparation), mar (MAR's .npz files or zhuyu-cs'
            LMDB), lightningdit, or arrays (.npy or .npz files).
        source: their folder.
        out: directory to make; an existing data set is never overwritten.
        val_source: folder of the same kind that becomes the split "val".
        val_fraction: without such a folder, share of the samples that become "val": the first of a permutation of seed 0; 0
            makes no such split.
        classes: number of classes, or a file with one name per line; 0 for none. MAR's folders tell the names themselves.
        autoencoder: a local directory in diffusers' layout, which tells its id, scale, shift and size; "pixel"; or an id.
            Without it the one of the project's own preparation; lightningdit, arrays and MAR's .npz files need one.
        scale: the network sees (z - shift) * scale.
        shift: see scale.
        image_size: height of the pictures, in pixels.
        holds: what arrays hold: mean_std, mean_logvar or latents; for the kind arrays only.
        dtype: to store; without it that of the files (bfloat16 becomes float32).
        shard_size: samples per shard; about three times a shard's size is in memory.
        shuffle_seed: mixes the samples, which are else in the order of their names, class by class; worth it for streaming.

    Raises:
        UserError: files of another kind, damaged or unlike each other, facts that are missing, or an ``out`` that is in use.
    """
    if shard_size < 1 or (shuffle_seed or 0) < 0 or (val_source is not None and val_fraction):
        raise UserError(
            f"Got --shard_size {shard_size}, --shuffle_seed {shuffle_seed}, --val_source {val_source}, --val_fraction "
            f"{val_fraction}, expected a size of at least 1, a seed of at least 0, and one of the last two. Correct them."
        )
    if (out / INFO_FILE).exists() and not (out / PROGRESS).exists():
        raise UserError(f"Got OUT = '{out}', which already holds a data set, expected a new folder. Give another one.")
    for folder in filter(None, (source, val_source)):
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"Got OUT = '{out}' inside of '{folder}', expected a folder outside of it. Give another one.")
    train = open_source(kind, source, holds)
    parts = _parts(train, open_source(kind, val_source, holds) if val_source else None, val_fraction, shuffle_seed)
    facts = _facts(kind, train, autoencoder, scale, shift, image_size)
    info = DatasetInfo(
        kind="latents" if train.holds == "latents" else "moments",
        latent_shape=_latent_shape(train),
        dtype=str(np.dtype(dtype) if dtype else _dtype(train)),
        flip=train.flip,
        class_names=_class_names(train, classes),
        **facts,
    )
    plan = {"layout": kind, "shard_size": shard_size, "shuffle_seed": shuffle_seed, "holds": train.holds, **asdict(info)}
    plan["splits"] = {part.split: [len(part.order), part.source.fingerprint()] for part in parts}
    _claim(out, plan)
    if not (out / INFO_FILE).exists():
        splits = {part.split: _write(out, part, info, shard_size) for part in parts}
        info = DatasetInfo(**{**info.__dict__, "splits": splits})
        _guard(lambda: write_info(out, info), out / INFO_FILE)
    shutil.rmtree(out / PROGRESS)
    _report(out, parts, info)


def _parts(train: Source, val: Source | None, val_fraction: float, shuffle_seed: int | None) -> list[Part]:
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
        count = round(val_fraction * len(train))
        if not 0 < count < len(train):
            raise UserError(
                f"Got --val_fraction {val_fraction} of {len(train):,} samples, which leaves {count:,} for validation, expected "
                "some for each split. Give another share."
            )
        held_out = np.zeros(len(train), bool)
        held_out[np.random.default_rng(0).permutation(len(train))[:count]] = True
        orders = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    if shuffle_seed is not None:
        orders = [np.random.default_rng(shuffle_seed).permutation(order) for order in orders]
    return [Part(*one) for one in zip(("train", "val"), (train, val or train), orders, strict=False)]


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


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Take a new or empty folder, or one where this very adoption was cut off."""
    file = out / PROGRESS / "plan.json"
    text = json.dumps(plan, indent=1, default=str) + "\n"
    if out.is_dir() and any(out.iterdir()) and not file.is_file():
        raise UserError(f"Got OUT = '{out}', which holds other files, expected a new or empty folder. Give another one.")
    if not file.is_file():
        _guard(lambda: write_aside(file, text.encode()), file)
    elif file.read_text() != text:
        before, now = json.loads(file.read_text()), json.loads(text)
        differ = ", ".join(key for key in now if before.get(key) != now[key])
        raise UserError(
            f"Got OUT = '{out}' with an unfinished adoption of another {differ}, expected the same: it would go on with other "
            "samples. Give the same command as before, or remove the folder."
        )
    for left in out.rglob(".*.tmp"):  # of a process that was killed
        left.unlink()


def _write(out: Path, part: Part, info: DatasetInfo, shard_size: int) -> tuple[ShardInfo, ...]:
    shards = []
    with tqdm(total=len(part.order), desc=f"Adopting {part.split}", unit="sample", disable=None) as bar:
        for number, start in enumerate(range(0, len(part.order), shard_size)):
            record = out / PROGRESS / f"{part.split}.{number:05d}.json"
            shard = _finished(out, part.split, record)
            if shard is None:
                shard = _write_shard(out, part, info, number, part.order[start : start + shard_size])
                content = json.dumps(asdict(shard)).encode()
                _guard(lambda file=record, content=content: write_aside(file, content), record)
            shards.append(shard)
            bar.update(shard.count)
    return tuple(shards)


def _finished(out: Path, split: str, record: Path) -> ShardInfo | None:
    """Return a shard that an earlier run wrote, if every byte of it is there."""
    if not record.is_file():
        return None
    shard = ShardInfo(**json.loads(record.read_text()))
    for ending, checksum in shard.sha256.items():
        file = shard_file(out, split, shard.name, ending)
        if not file.is_file() or file_checksum(file) != checksum:
            return None
    return shard


def _write_shard(out: Path, part: Part, info: DatasetInfo, number: int, index: np.ndarray) -> ShardInfo:
    def name(row: int) -> str:
        return part.source.name(int(index[row]))

    rows = part.source.read(index)
    check_labels(rows.labels, len(info.class_names), where=f"shard {number} of {part.split}, which begins with {name(0)}")
    stored, flipped = (
        None if values is None else to_stored(values, holds=part.source.holds, dtype=np.dtype(info.dtype), name=name)
        for values in (rows.stored, rows.flipped)
    )
    return _guard(
        lambda: write_shard(out, part.split, number, latents=stored, labels=rows.labels, flipped=flipped),
        out / part.split / f"{number:05d}",
    )


def _guard(write, what: Path):
    """Do a write; a full disk ends in a message, and what is whole stays."""
    try:
        return write()
    except OSError as error:
        raise UserError(
            f"Got '{what}' not written ({error.strerror or error}), expected space and permission for it. Free some space, "
            "then give the same command again: what is whole is kept."
        ) from error


def _report(out: Path, parts: list[Part], info: DatasetInfo) -> None:
    counts = ", ".join(f"{len(part.order):,} {part.split}" for part in parts)
    flip = " and mirrored copies" if info.flip else ""
    print(
        f"Wrote {counts} samples to {out}: {info.kind}{flip} of shape {info.latent_shape}, {info.dtype}, "
        f"{len(info.class_names):,} classes\n"
        f"autoencoder {info.autoencoder}, scale {info.scale}, shift {info.shift}, images of {info.image_size} pixels"
    )
    if len(parts) == 1:
        print(
            'There is no split "val": hold some out when training (data.init_args.subset), or adopt again with --val_fraction.'
        )
