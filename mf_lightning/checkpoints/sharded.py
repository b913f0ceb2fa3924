"""Checkpoints as directories of shards, by torch's distributed checkpoint, without its pickles.

A directory holds ``__0_0.distcp``, ... (tensors, each process its own part), ``.metadata`` (which part is where), ``meta.pt``
(everything else, plain values) and ``checksums.json`` (length and CRC-32 of all of them; written last).
"""

from __future__ import annotations

import errno
import io
import json
import pickle
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from mf_lightning.checkpoints.publish import aside_path, discard, final_path, publish

META, CHECKSUMS, INDEX = "meta.pt", "checksums.json", ".metadata"
READ_ERRORS = (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What a damaged or foreign checkpoint may raise."""

_MARK = "__tensor__"
_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "_MEM_FORMAT_ENCODING", "StorageMeta",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath"),
    ("pathlib", "Path"),
}  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    """Reads the index of torch's distributed checkpoint and nothing else: the classes it is made of, and dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index asks for {module}.{name}")


class _Reader(FileSystemReader):
    """torch's reader; its index is read without running code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(self.path))
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Writer(FileSystemWriter):
    """torch's writer, which also notes checksums, and names the directory when every process has written."""

    def __init__(self, aside: Path, path: Path, meta: dict[str, Any]) -> None:
        super().__init__(aside, single_file_per_rank=True, sync_files=True)
        self._aside, self._target, self._meta = aside, path, meta

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        written.wait()
        prefix = plan.storage_data.prefix
        sums = {file.name: _checksum(file) for file in sorted(self._aside.glob(f"{prefix}*.distcp"))}
        (self._aside / f"{prefix}.json").write_text(json.dumps(sums))
        return written

    def finish(self, metadata: Metadata, results: Any) -> None:
        """On the first process, after all have written: index, other values, checksums, name."""
        super().finish(metadata, results)
        torch.save(self._meta, self._aside / META)
        sums = {name: _checksum(self._aside / name) for name in (INDEX, META)}
        for name in sorted(_named(metadata)):
            part = self._aside / f"{name[: name.rindex('_') + 1]}.json"
            _appears(part)
            sums[name] = json.loads(part.read_text())[name]
        for part in self._aside.glob("__*_.json"):
            part.unlink()
        (self._aside / CHECKSUMS).write_text(json.dumps(sums))
        publish(self._aside, self._target, step=self._meta["global_step"])


def is_sharded(path: Path) -> bool:
    """Tell whether a path is a directory of shards."""
    return path.is_dir() and (path / META).is_file()


def prepare(path: Path, step: int) -> Path:
    """Return an empty hidden directory beside the path to write into; the first process calls it."""
    aside = aside_path(final_path(path, step))
    discard(aside)
    aside.mkdir(parents=True)
    return aside


def split(checkpoint: Any, keys: tuple[Any, ...] = ()) -> tuple[Any, dict[str, Tensor]]:
    """Return a checkpoint with its tensors replaced by names, and the tensors by name."""
    if isinstance(checkpoint, Tensor):
        name = "/".join(map(str, keys))
        return {_MARK: name}, {name: checkpoint.detach()}
    if isinstance(checkpoint, (dict, list, tuple)):
        items = checkpoint.items() if isinstance(checkpoint, dict) else enumerate(checkpoint)
        parts, tensors = {}, {}
        for key, value in items:
            parts[key], found = split(value, (*keys, key))
            tensors.update(found)
        return (parts if isinstance(checkpoint, dict) else type(checkpoint)(parts.values())), tensors
    return checkpoint, {}


def join(skeleton: Any, tensor: Callable[[tuple[Any, ...], str], Any], keys: tuple[Any, ...] = ()) -> Any:
    """Put tensors back: the opposite of :func:`split`; ``tensor`` is asked for each by its keys and its name."""
    if isinstance(skeleton, dict):
        if set(skeleton) == {_MARK}:
            return tensor(keys, skeleton[_MARK])
        return {key: join(value, tensor, (*keys, key)) for key, value in skeleton.items()}
    if isinstance(skeleton, (list, tuple)):
        return type(skeleton)(join(value, tensor, (*keys, i)) for i, value in enumerate(skeleton))
    return skeleton


def write(checkpoint: dict[str, Any], aside: Path, path: Path, *, group: Any, background: bool) -> Any:
    """Write a checkpoint of sharded tensors; every process calls it, with the directory that the first one prepared.

    Args:
        checkpoint: with DTensors among its tensors.
        aside: empty directory.
        path: name for it when it is whole.
        group: gloo process group that is used for nothing else; None is the default group.
        background: copy the tensors and write them while training goes on.

    Returns:
        A future in the background, else None.
    """
    meta, tensors = split(checkpoint)
    writer = _Writer(aside, path, meta)
    if background:
        return torch.distributed.checkpoint.async_save(tensors, storage_writer=writer, process_group=group)
    torch.distributed.checkpoint.save(tensors, storage_writer=writer, process_group=group)
    return None


def read_index(path: Path) -> Metadata:
    """Return which part of which tensor is where.

    Raises:
        pickle.UnpicklingError: it is made of more than plain values.
        RuntimeError: it lists values that are no tensors.
    """
    metadata = _PlainUnpickler(io.BytesIO((path / INDEX).read_bytes())).load()
    others = [name for name, kept in metadata.state_dict_metadata.items() if not isinstance(kept, TensorStorageMetadata)]
    if others:
        raise RuntimeError(f"its index lists {others[0]}, which is no tensor")
    return metadata


def read_header(path: Path) -> dict[str, Any]:
    """Return everything but the tensors' values; they lie on the device "meta"."""
    kept = read_index(path).state_dict_metadata
    skeleton = torch.load(path / META, map_location="cpu", weights_only=True)
    return join(skeleton, lambda keys, name: torch.empty(kept[name].size, dtype=kept[name].properties.dtype, device="meta"))


def read(
    path: Path,
    *,
    place: Callable[[tuple[Any, ...], torch.Size], Tensor | None] | None,
    only: Callable[[tuple[Any, ...]], bool] | None = None,
) -> dict[str, Any]:
    """Read a directory of shards: whole tensors on the CPU, or as ``place`` lays them out; then every process calls it."""
    kept = read_index(path).state_dict_metadata
    skeleton = torch.load(path / META, map_location="cpu", weights_only=True)
    tensors: dict[str, Tensor] = {}

    def empty(keys: tuple[Any, ...], name: str) -> Tensor:
        size, dtype = kept[name].size, kept[name].properties.dtype
        if only is not None and not only(keys):
            return torch.empty(size, dtype=dtype, device="meta")
        like = None if place is None else place(keys, size)
        if isinstance(like, DTensor):
            tensors[name] = torch.empty_like(like, dtype=dtype)
        else:
            tensors[name] = torch.empty(size, dtype=dtype)
        return tensors[name]

    checkpoint = join(skeleton, empty)
    alone = place is None or not (dist.is_available() and dist.is_initialized())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
        try:
            torch.distributed.checkpoint.load(tensors, storage_reader=_Reader(path), no_dist=alone)
        except CheckpointException as error:  # no Exception to Python, so nothing above would tell the user
            raise RuntimeError(next((str(what[0]) for what in error.failures.values()), "an error of the disk")) from error
    return checkpoint


def _named(metadata: Metadata) -> set[str]:
    """Return the files that hold the tensors of an index."""
    return {info.relative_path for info in metadata.storage_data.values()}


def _appears(file: Path, wait_s: float = 60.0) -> None:
    """Wait for what another node has written: a network file system may show it late.

    Raises:
        OSError: it does not appear.
    """
    limit = time.monotonic() + wait_s
    while not file.exists():
        if time.monotonic() > limit:
            raise FileNotFoundError(errno.ENOENT, f"not to be seen {wait_s:.0f} s after another process wrote it", str(file))
        time.sleep(0.1)


def verify(path: Path, *, rank: int = 0, world: int = 1) -> None:
    """Compare all files with the checksums written with them, or every ``world``-th of them from ``rank`` on.

    Raises:
        RuntimeError, OSError, pickle.UnpicklingError: something is missing, cut or altered.
    """
    if not (path / CHECKSUMS).is_file():
        raise RuntimeError("a directory without checksums.json is no checkpoint")
    sums = json.loads((path / CHECKSUMS).read_text())
    for name in sorted(sums)[rank::world]:
        found = _checksum(path / name)
        if found != sums[name]:
            raise RuntimeError(f"its file {name} has length and checksum {found}, not {sums[name]}")
    missing = {INDEX, META, *_named(read_index(path))} - set(sums)
    if missing:
        raise RuntimeError(f"its checksums leave out {', '.join(sorted(missing))}")


def _checksum(file: Path) -> list[int]:
    """Return length and CRC-32."""
    total, length = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            total, length = zlib.crc32(block, total), length + len(block)
    return [length, total]
