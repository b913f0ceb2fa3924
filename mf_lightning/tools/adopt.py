"""`adopt`: another project's latents as a data set of this one, without encoding anything again."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from mf_lightning.data.aside import write_aside
from mf_lightning.data.checksum import file_checksum
from mf_lightning.data.foreign import Holds, open_source
from mf_lightning.data.foreign.moments import to_stored
from mf_lightning.data.shards import (
    INFO_FILE,
    DatasetInfo,
    ShardInfo,
    check_labels,
    read_info,
    shard_file,
    write_info,
    write_shard,
)
from mf_lightning.tools.adopt_plan import Part, describe, make_parts
from mf_lightning.tools.hold import Hold, is_left_over
from mf_lightning.types import UserError

PROGRESS = ".adopt"
"""Folder in OUT of an unfinished adoption: what is being adopted, and which shards are whole."""
PLAN = f"{PROGRESS}/plan.json"


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
    follow_links: bool = False,
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
        follow_links: also take what symbolic links out of a folder point to.

    Raises:
        UserError: files of another kind, damaged or unlike each other, facts that are missing, or an ``out`` that is in use.
    """
    if shard_size < 1 or (shuffle_seed or 0) < 0 or (val_source is not None and val_fraction):
        raise UserError(
            f"Got --shard_size {shard_size}, --shuffle_seed {shuffle_seed}, --val_source {val_source}, --val_fraction "
            f"{val_fraction}, expected a size of at least 1, a seed of at least 0, and one of the last two. Correct them."
        )
    _check_out(out)
    for folder in filter(None, (source, val_source)):
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"Got OUT = '{out}' inside of '{folder}', expected a folder outside of it. Give another one.")
    train = open_source(kind, source, holds, follow_links)
    val = open_source(kind, val_source, holds, follow_links) if val_source else None
    parts = make_parts(train, val, val_fraction, shuffle_seed)
    info = describe(kind, train, autoencoder, scale, shift, image_size, classes, dtype)
    plan = {"layout": kind, "shard_size": shard_size, "shuffle_seed": shuffle_seed, "holds": train.holds, **asdict(info)}
    plan |= {"source": source.resolve(), "val_source": val_source and val_source.resolve()}  # names alone are alike everywhere
    plan["splits"] = {part.split: [len(part.order), part.source.fingerprint()] for part in parts}
    hold = _guard(lambda: Hold(out), out)
    try:
        _claim(out, plan)
        if not (out / INFO_FILE).exists():
            splits = {part.split: _write(out, part, info, shard_size) for part in parts}
            _guard(lambda: write_info(out, replace(info, splits=splits)), out / INFO_FILE)
        shutil.rmtree(out / PROGRESS)
    finally:
        hold.release()
    _report(out, read_info(out))


def _check_out(out: Path) -> None:
    """Refuse what is no new or empty folder, and no unfinished adoption."""
    if out.exists() and not out.is_dir():
        raise UserError(f"Got OUT = '{out}', which is a file, expected a new or empty folder. Give another one.")
    if (out / PLAN).is_file() or not out.exists():
        return
    if (out / INFO_FILE).exists():
        raise UserError(f"Got OUT = '{out}', which already holds a data set, expected a new folder. Give another one.")
    others = sorted(entry.name for entry in out.iterdir() if entry.name != PROGRESS and not is_left_over(entry))
    if others:
        raise UserError(
            f"Got OUT = '{out}', which holds other files ({others[0]!r}), expected a new or empty folder. Give another one."
        )


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Begin, or go on where this very adoption was cut off."""
    file = out / PLAN
    text = json.dumps(plan, indent=1, default=str) + "\n"
    _check_out(out)  # once more: another job may have been here meanwhile
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


def _report(out: Path, info: DatasetInfo) -> None:
    counts = ", ".join(f"{info.count(split):,} {split}" for split in info.splits)
    flip = " and mirrored copies" if info.flip else ""
    print(
        f"Wrote {counts} samples to {out}: {info.kind}{flip} of shape {info.latent_shape}, {info.dtype}, "
        f"{len(info.class_names):,} classes\n"
        f"autoencoder {info.autoencoder}, scale {info.scale}, shift {info.shift}, images of {info.image_size} pixels"
    )
    if info.class_names:
        labels = (np.load(shard_file(out, "train", shard.name, "labels")) for shard in info.splits["train"])
        present = len(np.unique(np.concatenate(list(labels))))
        if present == 1:
            print("warning: all samples are of one class; are these the right labels?")
        elif present < len(info.class_names):
            print(f"warning: only {present:,} of {len(info.class_names):,} classes have samples; is --classes right?")
    if len(info.splits) == 1:
        print(
            'There is no split "val": hold some out when training (data.init_args.subset), or adopt again with --val_fraction.'
        )
    print(f"Look at it with `python -m mf_lightning verify {out}`")
