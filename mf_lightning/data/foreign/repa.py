"""REPA's latents: ``vae-sd/00000/img-mean-std-00000000.npy`` and ``vae-sd/dataset.json``.

Layout and content as in sihyun-yu/REPA 2b8c181 ``preprocessing/dataset_tools.py`` (encode), ``preprocessing/encoders.py`` and
``dataset.py``; HaoyiZhu/MeanFlow-PyTorch and others train on the same folder. A file holds mean and STD (not log-variance),
stacked, (2C, h, w), unscaled; ``dataset.json`` is ``{"labels": [[name, label], ...]}``, or null without labels. Order: sorted
names. The preparation takes stabilityai/sd-vae-ft-mse unless told otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mf_lightning.data.foreign.source import Facts, FilePerSample, files_below, has_file, load_npy, whole_label
from mf_lightning.data.walk import check_link
from mf_lightning.types import UserError

LABELS = "dataset.json"


class RepaSource(FilePerSample):
    """Moments in .npy files, labels in one JSON file.

    Args:
        path: the folder ``vae-sd``, or the one that holds it.
        follow_links: also take what symbolic links out of the folder point to.

    Raises:
        UserError: labels and files that do not match, by name.
    """

    layout = f"a folder (or its vae-sd) with {LABELS} and **/*.npy"
    holds = "mean_std"
    facts = Facts("stabilityai/sd-vae-ft-mse", 0.18215, 0.0, 8)

    def __init__(self, path: Path, follow_links: bool = False) -> None:
        root = _root(path)
        for part in (root, root / LABELS):
            check_link(part, path, follow_links=follow_links)
        files = sorted(files_below(root, ".npy", follow_links=follow_links, within=path))
        self.labels = _match(_read_labels(root / LABELS), files, root)
        super().__init__(root, files)

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Look for ``dataset.json`` with labels, and an array."""
        file = _root(path) / LABELS
        if not file.is_file():
            return False
        with file.open("rb") as stream:
            head = stream.read(200)
        return b'"labels"' in head and b'"format"' not in head and has_file(_root(path), ".npy")

    def contents(self) -> Iterator[str]:
        """Yield names and labels."""
        return (f"{name} {label}" for name, label in zip(self.files, self.labels, strict=True))

    def read_file(self, number: int) -> tuple[np.ndarray, int, None]:
        """Read one array."""
        return load_npy(self.root / self.files[number]), int(self.labels[number]), None


def _root(path: Path) -> Path:
    return path / "vae-sd" if (path / "vae-sd").is_dir() else path


def _read_labels(file: Path) -> dict[str, object] | None:
    try:
        pairs = json.loads(file.read_bytes())["labels"]
        if pairs is None:
            return None
        labels = dict(pairs)
        if len(labels) != len(pairs):
            raise ValueError(f"{len(pairs) - len(labels):,} names occur twice")
        return labels
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"Got '{file}', which cannot be read ({error}), expected {{\"labels\": [[name, label], ...]}} or null. Copy it "
            "once more, or correct it."
        ) from error


def _match(labels: dict[str, object] | None, files: list[str], root: Path) -> np.ndarray:
    if labels is None:
        return np.zeros(len(files), np.int64)
    without_label, without_file = sorted(set(files) - set(labels)), sorted(set(labels) - set(files))
    if without_label or without_file:
        first = f"'{without_label[0]}' has no label" if without_label else f"'{without_file[0]}' has no file"
        raise UserError(
            f"Got {len(files):,} files and {len(labels):,} labels in '{root}' that do not match ({len(without_label):,} files "
            f"without a label, {len(without_file):,} labels without a file; {first}), expected one for each. Copy the folder "
            f"once more, or correct {LABELS}."
        )
    return np.array([whole_label(labels[name], f"'{name}'") for name in files], np.int64)
