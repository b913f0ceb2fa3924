"""A data set in the making: its settings, a record of each finished shard, and the last step that makes it one.

OUT/encode.json                       the settings, written first; OUT is only ever continued with the same ones
OUT/.encode/train-00000.json          record of a shard, written after its files; the folder goes when all is done
OUT/.encode/train-00000.features.npy  features of the shard's pictures, where reference statistics are asked for
OUT/unreadable.jsonl                  images that were skipped: split, sample, name, reason
OUT/reference.npz                     statistics of the training split's cropped pictures, on request
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mf_lightning.data.aside import write_aside
from mf_lightning.data.shards import (
    INFO_FILE,
    DatasetInfo,
    ShardInfo,
    open_split,
    read_info,
    shard_file,
    write_info,
    write_shard,
)
from mf_lightning.tools.hold import Hold, is_left_over
from mf_lightning.types import UserError

SETTINGS_FILE = "encode.json"
UNREADABLE_FILE = "unreadable.jsonl"
REFERENCE_FILE = "reference.npz"
KEPT_FEATURES = 50_000
"""The reference file also holds the features themselves, for precision and recall, of up to so many pictures."""


@dataclass(frozen=True)
class EncodedShard:
    """What one shard's images became."""

    split: str
    number: int
    found: int
    """Images numbered for this shard, readable or not."""
    latents: np.ndarray
    """(n, ...) of the readable ones."""
    labels: np.ndarray
    flipped: np.ndarray | None
    features: np.ndarray | None
    unreadable: list[dict[str, Any]]
    """``sample``, ``name`` and ``reason`` of each image that could not be read."""
    traits: dict[str, int]
    """How many images had what done to them."""


@dataclass(frozen=True)
class Record:
    """A finished shard."""

    shard: dict[str, Any] | None
    """Its entry for dataset.json; None where not one image could be read."""
    sizes: dict[str, int]
    """Bytes of each of its files, by ending."""
    found: int
    unreadable: list[dict[str, Any]]
    traits: dict[str, int]


class EncodeOut:
    """The directory that `encode` fills.

    Args:
        path: of the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path / ".encode"

    def begin(self, settings: dict[str, Any]) -> bool:
        """Take the directory over, and tell whether the data set is whole already.

        Raises:
            UserError: it holds something else, or was begun with other settings.
        """
        file, info = self.path / SETTINGS_FILE, self.path / INFO_FILE
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"Got OUT = '{self.path}', which is a file, expected a new or empty folder. Give another.")
        self._refuse_others()
        if not info.exists():
            self._take_hold()
            self._refuse_others()  # once more: another job may have begun meanwhile
        if not file.exists():
            self._write(file, json.dumps(settings, indent=1).encode() + b"\n")
        begun = self._begun()
        differ = [key for key in {**begun, **settings} if begun.get(key) != settings.get(key)]
        if differ:
            got, expected = (", ".join(f"{key} = {values.get(key)!r}" for key in differ) for values in (settings, begun))
            raise UserError(
                f"Got {got} for OUT = '{self.path}', expected {expected}, with which it was begun. Give the same settings and "
                "images, or another OUT."
            )
        for entry in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
            if is_left_over(entry):
                entry.unlink()
        if not info.exists():
            return False
        whole = read_info(self.path)
        for split in whole.splits:
            open_split(self.path, whole, split)  # refuses files that are gone or shorter
        shutil.rmtree(self.aside, ignore_errors=True)
        return True

    def _begun(self) -> dict[str, Any]:
        """Return the settings with which the folder was begun."""
        file = self.path / SETTINGS_FILE
        try:
            return dict(json.loads(file.read_bytes()).items())
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"Got '{file}', which holds no settings of this command, expected those with which OUT was begun. Give another "
                "folder."
            ) from error

    def _refuse_others(self) -> None:
        """Refuse a folder that holds something and was not begun by this command."""
        if (self.path / SETTINGS_FILE).exists():
            self._begun()
            return
        if (self.path / INFO_FILE).exists():
            raise UserError(f"Got OUT = '{self.path}', which holds another data set, expected a new folder. Give another.")
        first = min((entry for entry in self.path.glob("*") if not is_left_over(entry)), default=None)
        if first is not None:
            raise UserError(
                f"Got OUT = '{self.path}', which holds {first.name!r}, expected a new or empty folder. Give another."
            )

    def _take_hold(self) -> None:
        try:
            self._hold = Hold(self.path)
        except OSError as error:
            raise self._lost(error) from error

    def _name(self, split: str, number: int) -> Path:
        return self.aside / f"{split}-{number:05d}.json"

    def is_done(self, split: str, number: int) -> bool:
        """Tell whether a shard has its record and all its files at their full size."""
        if not self._name(split, number).exists():
            return False
        record = self.record(split, number)
        name = f"{number:05d}"
        files = {shard_file(self.path, split, name, ending): size for ending, size in record.sizes.items()}
        return all(file.exists() and file.stat().st_size == size for file, size in files.items())

    def record(self, split: str, number: int) -> Record:
        """Return the record of a finished shard."""
        return Record(**json.loads(self._name(split, number).read_text()))

    def write(self, shard: EncodedShard) -> None:
        """Write a shard's files, then its record.

        Raises:
            UserError: the disk is full, or cannot be written.
        """
        split, number, info = shard.split, shard.number, None
        try:
            if len(shard.labels):
                arrays = {"latents": shard.latents, "labels": shard.labels, "flipped": shard.flipped}
                info = write_shard(self.path, split, number, **arrays)
            if shard.features is not None:
                self._write(self._features(split, number), npy_bytes(shard.features))
            endings = [] if info is None else list(info.sha256)
            sizes = {end: shard_file(self.path, split, info.name, end).stat().st_size for end in endings}
            entry = None if info is None else asdict(info)
            record = Record(entry, sizes, shard.found, shard.unreadable, shard.traits)
            self._write(self._name(split, number), json.dumps(asdict(record)).encode())
        except OSError as error:
            raise self._lost(error) from error

    def _write(self, file: Path, content: bytes) -> None:
        try:
            write_aside(file, content)
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> UserError:
        return UserError(
            f"Got OUT = '{self.path}', where a file could not be written ({error.strerror}), expected space and the right to "
            "write. The finished shards are kept: free some space, then give the same command again."
        )

    def _features(self, split: str, number: int) -> Path:
        return self.aside / f"{split}-{number:05d}.features.npy"

    def finish(
        self, info: DatasetInfo, shards: Mapping[str, int], reference: dict[str, Any] | None, *, stop_at_unreadable: bool
    ) -> Counter[str]:
        """Join all records: unreadable.jsonl, reference.npz, and dataset.json last. Return the counts for the summary.

        Args:
            info: of the data set, without its splits.
            shards: number of shards of each split.
            reference: what reference.npz says of itself; None makes none.
            stop_at_unreadable: refuse images that an earlier attempt skipped.

        Raises:
            UserError: a split of which not one image could be read, or the disk is full.
        """
        records = {split: [self.record(split, number) for number in range(count)] for split, count in shards.items()}
        splits = {split: tuple(ShardInfo(**r.shard) for r in found if r.shard is not None) for split, found in records.items()}
        counts: Counter[str] = Counter()
        for split, found in records.items():
            counts[f"{split} found"] = sum(r.found for r in found)
            counts[f"{split} written"] = sum(s.count for s in splits[split])
            counts[f"{split} unreadable"] = sum(len(r.unreadable) for r in found)
            assert counts[f"{split} found"] == counts[f"{split} written"] + counts[f"{split} unreadable"]
            for record in found:
                counts.update(record.traits)
            if not splits[split]:
                first = found[0].unreadable[0]
                raise UserError(
                    f"Got not one readable image of {counts[f'{split} found']:,} in the split '{split}' (the first is "
                    f"{first['name']!r}: {first['reason']}), expected some. Give another SOURCE."
                )
        lost = [{"split": split, **line} for split, found in records.items() for record in found for line in record.unreadable]
        if lost and stop_at_unreadable:
            raise UserError(
                f"Got {len(lost):,} image(s) that an earlier attempt could not read (the first is {lost[0]['name']!r}: "
                f"{lost[0]['reason']}), expected none with --unreadable=stop. Give --unreadable=skip to finish without them."
            )
        if lost:
            self._write(self.path / UNREADABLE_FILE, "".join(json.dumps(line) + "\n" for line in lost).encode())
        if reference is not None:
            self._write(self.path / REFERENCE_FILE, self._reference(shards["train"], reference))
        try:
            write_info(self.path, replace(info, splits=splits))
        except OSError as error:
            raise self._lost(error) from error
        shutil.rmtree(self.aside, ignore_errors=True)
        self._hold.release()
        return counts

    def _reference(self, shards: int, about: dict[str, Any]) -> bytes:
        """Return the bytes of reference.npz: mean and covariance of all features, in float64, one shard in memory at a time."""
        parts = [self._features("train", number) for number in range(shards)]
        count = sum(len(part) for part in _arrays(parts))
        if count < 2:
            raise UserError(f"Got {count} readable image(s) for --reference=true, expected at least 2. Leave it out.")
        mu = sum(part.sum(axis=0, dtype=np.float64) for part in _arrays(parts)) / count
        centred = (part.astype(np.float64) - mu for part in _arrays(parts))
        sigma = sum(part.T @ part for part in centred) / (count - 1)
        arrays: dict[str, Any] = {"mu": mu, "sigma": sigma, "about": json.dumps({**about, "count": count})}
        if count <= KEPT_FEATURES:
            arrays["features"] = np.concatenate(list(_arrays(parts)))
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()


def _arrays(files: list[Path]) -> Iterator[np.ndarray]:
    return (np.load(file, allow_pickle=False) for file in files)


def npy_bytes(array: np.ndarray) -> bytes:
    """Return the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
