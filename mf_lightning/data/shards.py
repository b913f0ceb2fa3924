"""The latent format: ``dataset.json`` and, per split, plain numpy shards that can be memory-mapped.

    DIR/dataset.json                      what is inside; written last, so its presence means a whole data set
    DIR/train/00000.latents.npy           (n, 2C, h, w) moments (mean, std), or (n, C, h, w) latents; never scaled
    DIR/train/00000.latents_flip.npy      the same of the mirrored pictures, where ``flip`` is true
    DIR/train/00000.labels.npy            (n,) int64

The network's input is ``(z - shift) * scale`` of a stored or sampled latent z.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mf_lightning.data.aside import write_aside
from mf_lightning.data.checksum import file_checksum
from mf_lightning.data.opened import OpenShard, allow_open_files, open_array
from mf_lightning.types import UserError

FORMAT = "mf_lightning latents"
FORMAT_VERSION = 1
INFO_FILE = "dataset.json"
KINDS = ("moments", "latents")


@dataclass(frozen=True)
class ShardInfo:
    """One shard as ``dataset.json`` lists it."""

    name: str
    """Number of the shard within its split, "00000"."""
    count: int
    sha256: dict[str, str]
    """Checksum of each file, by its ending: "latents", "labels", and "latents_flip" where there is one."""


@dataclass(frozen=True)
class DatasetInfo:
    """Everything ``dataset.json`` says."""

    kind: str
    """"moments" (mean and std, stacked along channels) or "latents"."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of one sampled latent, whatever the kind."""
    dtype: str
    """Of the stored latents: "float16" or "float32"."""
    flip: bool
    """Whether a mirrored copy is stored."""
    autoencoder: str
    """Id of the autoencoder that made the latents."""
    scale: float
    shift: float
    image_size: int
    class_names: tuple[str, ...]
    """Empty for a data set without labels."""
    splits: dict[str, tuple[ShardInfo, ...]] = field(default_factory=dict)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of one stored row: twice the channels for moments."""
        channels, height, width = self.latent_shape
        return (2 * channels if self.kind == "moments" else channels, height, width)

    @property
    def files(self) -> tuple[str, ...]:
        """Endings of a shard's files."""
        return ("latents", "latents_flip", "labels") if self.flip else ("latents", "labels")

    def count(self, split: str) -> int:
        """Return the number of samples of a split."""
        return sum(shard.count for shard in self.splits[split])

    def describe(self) -> dict[str, Any]:
        """Return everything but the shards, as plain values: what a checkpoint tells of its data, for those who sample."""
        fields = asdict(self)
        del fields["splits"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

    @classmethod
    def described(cls, fields: dict[str, Any]) -> DatasetInfo:
        """Return the data that :meth:`describe` told of, without splits.

        Raises:
            KeyError, TypeError, ValueError: fields missing or wrong.
        """
        return _parse_fields(fields, {})

    def to_json(self) -> str:
        """Return the text of ``dataset.json``."""
        fields = asdict(self)
        splits = fields.pop("splits")
        body = {name: {"count": self.count(name), "shards": list(shards)} for name, shards in splits.items()}
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **fields, "splits": body}, indent=1) + "\n"


def read_info(path: str | Path) -> DatasetInfo:
    """Return what the data set at ``path`` says of itself.

    Raises:
        UserError: no such directory, no ``dataset.json``, another format or version, missing or wrong fields.
    """
    path = Path(path)
    how = "Make one with `python -m mf_lightning encode` (or adopt, prepare-digits), or give another path."
    if not path.is_dir():
        raise UserError(f"Got the data set path '{path}', which is no directory, expected one with {INFO_FILE}. {how}")
    file = path / INFO_FILE
    if not file.is_file():
        raise UserError(
            f"Got the directory '{path}' without {INFO_FILE}, expected a data set; {INFO_FILE} is written last, so an "
            f"interrupted preparation lacks it. {how}"
        )
    return parse_info(file.read_text(errors="replace"), where=str(file))


def parse_info(text: str, *, where: str) -> DatasetInfo:
    """Return what the text of a ``dataset.json`` says.

    Args:
        text: its content.
        where: its path or URL, for messages.

    Raises:
        UserError: another format or version, missing or wrong fields.
    """
    try:
        return _parse_info(json.loads(text))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"Got '{where}', which cannot be read as a data set ({reason}), expected format '{FORMAT}', version "
            f"{FORMAT_VERSION}. Prepare the data set again."
        ) from error


def _parse_info(body: dict[str, Any]) -> DatasetInfo:
    if body["format"] != FORMAT or body["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format {body['format']!r}, version {body['format_version']!r}")
    splits = {}
    for split, content in body["splits"].items():
        splits[split] = tuple(ShardInfo(s["name"], s["count"], s["sha256"]) for s in content["shards"])
        if sum(shard.count for shard in splits[split]) != content["count"]:
            raise ValueError(f"the shards of '{split}' do not add up to its count {content['count']}")
    return _parse_fields(body, splits)


def _parse_fields(body: dict[str, Any], splits: dict[str, tuple[ShardInfo, ...]]) -> DatasetInfo:
    if body["kind"] not in KINDS:
        raise ValueError(f"kind {body['kind']!r}, expected one of {KINDS}")
    return DatasetInfo(
        kind=body["kind"],
        latent_shape=tuple(body["latent_shape"]),
        dtype=body["dtype"],
        flip=body["flip"],
        autoencoder=body["autoencoder"],
        scale=float(body["scale"]),
        shift=float(body["shift"]),
        image_size=body["image_size"],
        class_names=tuple(body["class_names"]),
        splits=splits,
    )


def shard_file(path: str | Path, split: str, name: str, ending: str) -> Path:
    """Return the path of one file of a shard."""
    return Path(path) / split / f"{name}.{ending}.npy"


def open_split(path: str | Path, info: DatasetInfo, split: str, *, checksums: bool = False) -> list[OpenShard]:
    """Return all shards of a split, checked for size, header and label range: latents memory-mapped, labels in memory.

    Args:
        path: the data set's directory.
        info: its ``dataset.json``.
        split: name of the split.
        checksums: also read every byte and compare checksums.

    Raises:
        UserError: an unknown split, a shard that is missing, truncated or altered, labels outside the class count.
    """
    if split not in info.splits:
        raise UserError(f"Got the split '{split}', expected one that '{path}' holds: {', '.join(info.splits)}.")
    if checksums:
        verify_checksums(path, info, split)
    allow_open_files((len(info.files) - 1) * len(info.splits[split]))
    shards = []
    for shard in info.splits[split]:
        stored = (shard.count, *info.stored_shape)

        def latents(ending: str, name: str = shard.name, shape: tuple[int, ...] = stored) -> np.ndarray:
            return open_array(shard_file(path, split, name, ending), shape=shape, dtype=np.dtype(info.dtype))

        label_file = shard_file(path, split, shard.name, "labels")
        labels = open_array(label_file, shape=(shard.count,), dtype=np.dtype(np.int64))
        check_labels(labels, len(info.class_names), where=str(label_file))
        opened = (latents("latents"), np.array(labels), latents("latents_flip") if info.flip else None)
        files = [str(shard_file(path, split, shard.name, ending)) for ending in info.files if ending != "labels"]
        shards.append(OpenShard(*opened, tuple((file, os.stat(file).st_size) for file in files)))
    return shards


def check_labels(labels: np.ndarray, num_classes: int, *, where: str) -> None:
    """Refuse labels outside [0, num_classes); a data set without classes has label 0 everywhere.

    Raises:
        UserError: naming the first label that does not fit.
    """
    top = max(num_classes, 1)
    bad = np.flatnonzero((labels < 0) | (labels >= top))
    if len(bad):
        raise UserError(
            f"Got label {labels[bad[0]]} in row {bad[0]} of '{where}' ({len(bad)} such rows), expected labels in "
            f"[0, {top}): the data set names {num_classes} classes. Correct the labels or the class names."
        )


def verify_checksums(path: str | Path, info: DatasetInfo, split: str) -> None:
    """Compare every file of a split with its checksum.

    Raises:
        UserError: naming the first file that is missing or altered.
    """
    for shard in info.splits[split]:
        for ending in info.files:
            file = shard_file(path, split, shard.name, ending)
            found = file_checksum(file) if file.is_file() else "no file"
            if found != shard.sha256[ending]:
                raise UserError(
                    f"Got checksum {found} of '{file}', expected {shard.sha256[ending]}: the file was altered or damaged. "
                    "Prepare the data set again, or copy the file once more."
                )


def write_shard(
    path: str | Path,
    split: str,
    number: int,
    *,
    latents: np.ndarray,
    labels: np.ndarray,
    flipped: np.ndarray | None = None,
) -> ShardInfo:
    """Write one shard and return its entry for ``dataset.json``.

    Args:
        path: the data set's directory.
        split: name of the split.
        number: of the shard.
        latents: (n, 2C, h, w) moments or (n, C, h, w) latents, unscaled, already in the dtype to store.
        labels: (n,) int64.
        flipped: the same as ``latents`` of the mirrored pictures, or None.
    """
    arrays = {"latents": latents, "labels": labels.astype(np.int64)}
    if flipped is not None:
        arrays["latents_flip"] = flipped
    name = f"{number:05d}"
    checksums = {}
    for ending, array in arrays.items():
        file = shard_file(path, split, name, ending)
        write_aside(file, _npy_bytes(array))
        checksums[ending] = file_checksum(file)
    return ShardInfo(name, len(labels), checksums)


def _npy_bytes(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_info(path: str | Path, info: DatasetInfo) -> None:
    """Write ``dataset.json``: the last step, which makes the directory a data set."""
    write_aside(Path(path) / INFO_FILE, info.to_json().encode())
