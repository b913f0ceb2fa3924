"""Reads an offline W&B run back: the records of run-ID.wandb, in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    """Yield every record of a file."""
    content, at, parts = file.read_bytes(), HEADER, b""
    assert content[:4] == b":W&B"
    while at + HEADER <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + HEADER])
        parts += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class OfflineRun:
    """What a server will get of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = self.id = ""
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.ended = False
        [file] = folder.glob("*.wandb")
        for record in records(file):
            self._take(record)

    def _take(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.name, self.id = record.run.display_name, record.run.run_id
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            self.history.append(row)
        elif kind == "summary":
            _update(self.summary, record.summary.update)
        elif kind == "config":
            _update(self.config, record.config.update)
        elif kind == "metric":
            self.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            self.artifacts.append(record.artifact)
        self.ended |= kind == "exit"

    def values(self, key: str) -> dict[int, Any]:
        """Return what was logged under a key, by step."""
        return {row["trainer/global_step"]: row[key] for row in self.history if key in row}

    def table(self, key: str) -> dict[str, Any]:
        """Return columns and data of the newest table under a key."""
        path = list(self.values(key).values())[-1]["path"]
        return json.loads((self.folder / "files" / path).read_text())


def _update(tree: dict[str, Any], items: Any) -> None:
    for item in items:
        keys, value = list(item.nested_key) or [item.key], json.loads(item.value_json)
        place = tree
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
