"""Which class an image has: by its folder, or by a labels file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mf_lightning.types import UserError

LABEL_FILES = ("labels.csv", "labels.json", "dataset.json")
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
"""Names of splits; folders of these names are hardly classes."""
NONE = "none"
"""Instead of a labels file: all images are of one nameless class."""
MAX_CLASSES = 1 << 20
_NAME_COLUMNS = ("file_name", "filename", "file", "name", "image", "path")
_FORMS = 'lines "NAME,LABEL", or json {"NAME": LABEL, ...} or {"labels": [["NAME", LABEL], ...]}'

Label = int | str
Labels = tuple[np.ndarray, tuple[str, ...]]
"""Labels, (N,) int64, and the classes' names."""


def no_labels(count: int) -> Labels:
    """Return label 0 for every image, and no classes."""
    return np.zeros(count, np.int64), ()


def number_classes(values: Sequence[Label], where: object) -> Labels:
    """Return numbers and names of classes: numbers stay as they are, names are numbered in sorted order.

    Args:
        values: each image's label; digits count as a number.
        where: file that they come from.

    Raises:
        UserError: numbers and names are mixed, a label is empty, or a number is negative or too large.
    """
    texts = [str(value) for value in values]
    if "" in texts:
        raise UserError(f"Got an empty label in '{where}', expected a number or a name for each image. Correct the labels.")
    numeric = [re.fullmatch(r"-?\d+", text) is not None for text in texts]
    if not any(numeric):
        names = sorted(set(texts))
        number = {name: k for k, name in enumerate(names)}
        return np.array([number[text] for text in texts], np.int64), tuple(names)
    if not all(numeric):
        odd = texts[numeric.index(False)]
        raise UserError(f"Got the label {odd!r} among numbers in '{where}', expected all numbers or all names. Correct it.")
    labels = np.array([int(text) for text in texts], object)
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        bad = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"Got label {bad} in '{where}', expected numbers in [0, {MAX_CLASSES:,}). Correct the labels.")
    return labels.astype(np.int64), tuple(str(k) for k in range(labels.max() + 1))


def parse_labels(content: bytes, name: str, where: object) -> dict[str, Label]:
    """Return the label of each name in a labels file.

    Args:
        content: of the file.
        name: of the file; its ending tells the form.
        where: what to call it in messages.

    Raises:
        UserError: the file has another form.
    """
    try:
        text = content.decode("utf-8-sig", "surrogateescape")
        pairs = _csv_pairs(text) if name.endswith(".csv") else _json_pairs(text)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"Got the labels file '{where}', which cannot be read ({error}), expected {_FORMS}.") from error
    table: dict[str, Label] = {}
    for key, label in pairs:
        key = key.replace("\\", "/")
        if table.setdefault(key, label) != label:
            raise UserError(f"Got two labels, {table[key]} and {label}, for {key!r} in '{where}', expected one. Remove one.")
    return table


def _csv_pairs(text: str) -> list[tuple[str, Label]]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if not rows:
        raise ValueError("it is empty")
    head = [cell.strip().lower() for cell in rows[0]]
    column = next((head.index(name) for name in _NAME_COLUMNS if name in head), None)
    if column is not None and "label" in head:
        which, rows = (column, head.index("label")), rows[1:]
    else:
        which = (0, 1)
        wide = next((row for row in rows if len(row) != 2), None)
        if wide is not None:
            raise ValueError(f"the line {','.join(wide)!r} has {len(wide)} cells, and no head names file_name and label")
    short = next((row for row in rows if len(row) <= max(which)), None)
    if short is not None:
        raise ValueError(f"the line {','.join(short)!r} has {len(short)} cells")
    return [(row[which[0]], row[which[1]].strip()) for row in rows]


def _json_pairs(text: str) -> list[tuple[str, Label]]:
    body = json.loads(text, object_pairs_hook=_each_once)
    if not isinstance(body, dict):
        raise TypeError(f"it holds a {type(body).__name__}")
    if body.get("labels", 0) is None:  # as StyleGAN writes it for images without classes
        raise TypeError("it has no labels; give --labels=none if that is meant")
    pairs = body["labels"] if isinstance(body.get("labels"), list) else list(body.items())
    for pair in pairs:
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or isinstance(pair[1], bool)
            or not isinstance(pair[1], int | str)
        ):
            raise TypeError(f"{json.dumps(pair)[:80]} is not a name and a label")
    return [(str(key), label) for key, label in pairs]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict, which alone would keep the last of two values silently."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if table.setdefault(key, value) != value:
            raise ValueError(f"it holds {key!r} twice, with {table[key]} and {value}")
    return table


def match_labels(names: Sequence[str], table: dict[str, Label], where: object) -> Labels:
    """Return the labels of images from a labels file that names exactly these images.

    Raises:
        UserError: images without a label, or labels without an image.
    """
    here = set(names)
    without, beyond = [name for name in names if name not in table], [name for name in table if name not in here]
    if without or beyond:
        parts = [
            f"{len(found):,} {what}, the first is {found[0]!r}"
            for found, what in ((without, "image(s) without a label"), (beyond, "label(s) without an image"))
            if found
        ]
        raise UserError(
            f"Got labels in '{where}' that do not match: {'; '.join(parts)}. Expected one label for each image, named by its "
            "path within SOURCE. Correct the file, or give another with --labels."
        )
    return number_classes([table[name] for name in names], where)


def classes_by_folder(names: Sequence[str], where: object) -> Labels:
    """Return labels by the first folder of each name, classes numbered in sorted order (ImageNet layout).

    Raises:
        UserError: some or all images lie in no folder, or the folders are splits.
    """
    loose = [name for name in names if "/" not in name]
    if loose:
        raise UserError(
            f"Got {len(loose):,} of {len(names):,} images in '{where}' outside of any class folder, the first is {loose[0]!r}, "
            f"and no labels file ({', '.join(LABEL_FILES)}). Expected a folder per class, or labels. Give --labels=FILE, or "
            "--labels=none for images without classes."
        )
    folders = [name.split("/", 1)[0] for name in names]
    classes = sorted(set(folders))
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLITS:
        raise UserError(
            f"Got the folders {', '.join(classes)} in '{where}', which look like splits, expected a folder per class. Give one "
            "of them as SOURCE and the other as --val_source; if they are classes, name them in a labels file: --labels=FILE."
        )
    number = {name: k for k, name in enumerate(classes)}
    return np.array([number[folder] for folder in folders], np.int64), tuple(classes)


def without_wrapper(names: Sequence[str]) -> str:
    """Return the folders that wrap a whole archive ("imagenet/train/"), which name no class; "" if there are none."""
    prefix = ""
    while names:
        first = names[0][len(prefix) :].split("/", 1)[0] + "/"
        longer = prefix + first
        if not all(name.startswith(longer) and "/" in name[len(longer) :] for name in names):
            break
        prefix = longer
    return prefix


def find_labels(
    names: Sequence[str], labels: str | None, inside: dict[str, bytes], where: object
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Return labels, class names, and where they come from: ``labels`` if given, a labels file inside, or the folders.

    Args:
        names: of the images, within the source.
        labels: a labels file, "none", or None.
        inside: labels files at the top of the source, by name.
        where: the source.

    Raises:
        UserError: no labels, or labels that do not match.
    """
    if labels == NONE:
        return *no_labels(len(names)), "no labels"
    if labels is not None:
        file = Path(labels).expanduser()
        if not file.is_file() or file.suffix not in (".csv", ".json"):
            raise UserError(f"Got --labels={labels}, expected a .csv or .json file ({_FORMS}), or none.")
        return *match_labels(names, parse_labels(file.read_bytes(), file.name, file), file), f"labels from {file}"
    found = next((name for name in LABEL_FILES if name in inside), None)
    if found is not None:
        file = f"{where}/{found}"
        return *match_labels(names, parse_labels(inside[found], found, file), file), f"labels from {found} in it"
    return *classes_by_folder(names, where), "one class per folder"
