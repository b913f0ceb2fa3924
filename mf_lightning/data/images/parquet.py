"""Images in parquet files as Hugging Face stores them: a column of {bytes, path} and a column of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mf_lightning.data.images.labels import NONE, Labels, no_labels, number_classes
from mf_lightning.data.images.source import ImageSource, Unreadable, check_size, no_images
from mf_lightning.types import UserError

LABEL_COLUMNS = ("label", "labels", "fine_label")
IMAGE_COLUMNS = ("image", "img")


class ParquetSource(ImageSource):
    """All rows of parquet files, files sorted by name; read in order, one row group in memory at a time.

    Args:
        paths: the files, all of the same columns.
        labels: "none", or None to read the column ``label``.

    Raises:
        UserError: no image column, no label column, labels without names, damaged files.
        ImportError: pyarrow is not installed.
    """

    any_order = False

    def __init__(self, paths: list[Path], labels: str | None = None) -> None:
        if labels not in (None, NONE):
            raise UserError(f"Got --labels={labels} for parquet files, expected their own labels. Leave it out, or give none.")
        self.paths = paths
        starts: list[int] = []
        self.groups: list[tuple[int, int]] = []
        """File and number within it of each row group."""
        names: list[str] = []
        schema = _open(paths[0]).schema_arrow
        self.column = _column(schema.names, IMAGE_COLUMNS, paths[0])
        label = None if labels == NONE else _column(schema.names, LABEL_COLUMNS, paths[0])
        for k, path in enumerate(paths):
            file, row = _open(path), 0
            for column in filter(None, (self.column, label)):
                _column(file.schema_arrow.names, (column,), path)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                starts.append(len(names))
                self.groups.append((k, group))
                names += [f"{path.name}#{row + i}" for i in range(rows)]
                row += rows
        if not names:
            raise no_images(paths[0].parent)
        self.starts = np.array(starts)
        found = no_labels(len(names)) if label is None else _labels(paths, schema, label)
        self._group: tuple[int, Any] | None = None
        how = "no labels" if labels == NONE else "parquet, labels from their column"
        super().__init__(names, *found, [how])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_group": None}

    def read(self, number: int) -> bytes:
        """Return the row's bytes."""
        group = int(np.searchsorted(self.starts, number, side="right")) - 1
        first, (file, in_file) = int(self.starts[group]), self.groups[group]
        if self._group is None or self._group[0] != group:
            self._group = None  # one row group in memory, not two
            self._group = (group, _read(self.paths[file], in_file, self.column))
        stored = self._group[1][number - first].as_py()
        content = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(content, bytes):
            told = f", only the path {stored['path']!r}" if isinstance(stored, dict) and stored.get("path") else ""
            raise Unreadable(f"the row holds no bytes{told}")
        check_size(len(content))
        return content


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files are read with the package pyarrow: pip install 'mf_lightning[encode]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from error


def _read(path: Path, group: int, column: str) -> Any:
    import pyarrow

    try:
        return _open(path).read_row_group(group, columns=[column]).column(column)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"Got '{path}', which cannot be read ({reason}), expected a whole parquet file. Download it again.")


def _column(names: list[str], wanted: tuple[str, ...], path: Path) -> str:
    found = next((name for name in wanted if name in names), None)
    if found is None:
        hint = " Give --labels=none for images without classes." if wanted is LABEL_COLUMNS else ""
        raise UserError(f"Got '{path}' with the columns {', '.join(names)}, expected {' or '.join(wanted)} among them.{hint}")
    return found


def _labels(paths: list[Path], schema: Any, column: str) -> Labels:
    """Return labels, numbered and named as the files' Hugging Face metadata says where they have it."""
    values = [value for path in paths for value in _open(path).read(columns=[column]).column(column).to_pylist()]
    odd = next((value for value in values if isinstance(value, bool) or not isinstance(value, int | str)), "")
    if odd != "":
        raise UserError(f"Got the label {odd!r} in '{paths[0].parent}', expected a number or a name in every row. Correct it.")
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = described.get("info", {}).get("features", {}).get(column, {}).get("names")
    labels, class_names = number_classes(values, paths[0].parent)
    if names is None or isinstance(values[0], str):
        return labels, class_names
    if len(class_names) > len(names):
        raise UserError(
            f"Got label {len(class_names) - 1} in '{paths[0].parent}', whose metadata names {len(names)} classes, expected "
            "labels below that. Correct the labels."
        )
    return labels, tuple(names)
