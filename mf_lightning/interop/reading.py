"""Files of weights that others wrote => plain trees of tensors, without running code that is in them.

What a file is, its first bytes tell: torch's zip archives and older pickles, safetensors, flax's msgpack; a folder is orbax's.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mf_lightning.types import UserError

JAX_HELP = "needs jax, flax and orbax-checkpoint. Install them: pip install 'mf_lightning[jax]'"
_ERRORS = (
    RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What readers raise at damaged files; torch's older format has no checksums, and asserts."""


@dataclass(frozen=True)
class SourceFile:
    """What a file or folder holds."""

    container: str
    """torch, safetensors, msgpack or orbax."""
    tree: Mapping[str, Any]
    """Nested dictionaries with tensors, and whatever else the file holds, at the leaves."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of safetensors."""


def read_source(path: Path, *, allow_code: bool = False) -> SourceFile:
    """Return what a file or folder of weights holds, tensors on the CPU.

    Args:
        path: file, or folder that orbax wrote.
        allow_code: read pickles that are made of more than tensors and plain values, which runs whatever code they ask for.

    Raises:
        UserError: nothing there, no weights, damaged, or a pickle that needs code.
        ImportError: a JAX checkpoint without the packages that read one.
    """
    if path.is_dir():
        return SourceFile("orbax", _tensors(_read_orbax(_orbax_folder(path))))
    if not path.is_file():
        raise UserError(f"Got SOURCE = {path}, which does not exist, expected a file of weights, or a folder that orbax wrote.")
    container = _container(path)
    try:
        if container == "safetensors":
            return _read_safetensors(path)
        if container == "msgpack":
            return SourceFile(container, _tensors(_read_msgpack(path)))
        tree = _read_torch(path, allow_code)
    except (*_ERRORS, pickle.UnpicklingError) as error:
        if isinstance(error, UserError):
            raise
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Got {path} ({path.stat().st_size} bytes), which cannot be read as {container} ({what[:200]}), expected a whole "
            "file. It is cut or damaged: copy or download it again, and compare its size or checksum."
        ) from error
    if not isinstance(tree, Mapping):
        raise UserError(
            f"Got {path} with a {type(tree).__name__} in it, expected a dictionary of tensors by name. Save the network's "
            "state_dict() in its place."
        )
    return SourceFile(container, tree)


def flatten(tree: Mapping[Any, Any], separator: str = "/") -> dict[str, Tensor]:
    """Return the tensors of a tree by their path; other leaves are left out."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        if isinstance(node, Tensor):
            yield separator.join(path), node
        elif isinstance(node, Mapping):
            for key, value in node.items():
                yield from walk(value, (*path, str(key)))

    return dict(walk(tree, ()))


def _container(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(512)
    again = "Download or copy the weights again."
    if not head:
        raise UserError(f"Got {path}, which is empty, expected a file of weights. {again}")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"Got {path}, which is a Git LFS pointer, expected the weights that it points to. Fetch them: git lfs pull, or "
            "download the file itself."
        )
    if re.match(rb"\s*<(!doctype|html|\?xml|head)", head, re.IGNORECASE):
        raise UserError(
            f"Got {path}, which is a web page, expected weights: the download gave a page instead (a login, a confirmation, a "
            "missing file). Open the address in a browser, or use its direct link."
        )
    if head.startswith(b"PK\x03\x04") or (head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "torch"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        return "msgpack"
    raise UserError(
        f"Got {path}, which begins with {head[:8]!r}, expected weights of torch (.pt, .pth, .ckpt), safetensors, flax "
        f"(msgpack), or a folder of orbax. {again}"
    )


def _read_torch(path: Path, allow_code: bool) -> Any:
    mmap = zipfile.is_zipfile(path)
    if allow_code:
        try:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
        except (AttributeError, ImportError) as error:
            raise UserError(
                f"Got {path}, a pickle whose code is not here ({str(error).splitlines()[0][:200]}), expected the classes that "
                "it names. Install the project that wrote it, or put its folder on PYTHONPATH; classes of a script itself "
                "(__main__) cannot be had: ask for its weights alone, as safetensors."
            ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values; training scripts keep their options in it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asked = re.search(
            r"GLOBAL (\S+)|Unsupported (?:class|global:?)\s+(\S+)|Trying to instantiate unsupported \S+ (\S+)", str(error)
        )
        if asked is None and "Unsupported" not in str(error):
            raise
        code = next((name for name in asked.groups() if name), "code") if asked else "code"
        raise UserError(
            f"Got {path}, a pickle that asks for {code}, expected tensors and plain values only: reading it would run code of "
            "whoever made it. If you trust them as you would a program, give --allow_code=true; else ask for safetensors."
        ) from error


def _read_safetensors(path: Path) -> SourceFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tree = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return SourceFile("safetensors", tree, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _read_msgpack(path: Path) -> Any:
    try:
        from flax.serialization import msgpack_restore
    except ImportError as error:
        raise ImportError(f"{path} is a flax checkpoint (msgpack), which {JAX_HELP}") from error
    return msgpack_restore(path.read_bytes())


def _orbax_folder(path: Path) -> Path:
    """Return the folder that holds a tree: itself, or the only one below it."""
    if any((path / mark).exists() for mark in ("_METADATA", "manifest.ocdbt")):
        return path
    found = sorted({mark.parent for mark in path.rglob("_METADATA")} | {mark.parent for mark in path.rglob("manifest.ocdbt")})
    found = [folder for folder in found if not any(other in folder.parents for other in found)]
    if len(found) == 1:
        return found[0]
    what = "no orbax checkpoint in it" if not found else f"{len(found)} checkpoints: {', '.join(map(str, found[:5]))}"
    raise UserError(f"Got the folder {path} with {what}, expected one. Give the folder of the one to import.")


def _read_orbax(path: Path) -> Any:
    try:
        import jax
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(f"{path} is a JAX checkpoint (orbax), which {JAX_HELP}") from error
    try:
        with ocp.PyTreeCheckpointer() as reader:
            kept = reader.metadata(path.absolute())
            kept = getattr(kept, "item_metadata", kept)
            shape = getattr(kept, "tree", kept)
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shape)
            return reader.restore(path.absolute(), restore_args=numpy)
    except Exception as error:  # orbax and tensorstore raise many kinds, all about this folder
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Got the orbax checkpoint {path}, which cannot be read ({what[:200]}), expected a whole one. Copy it again."
        ) from error


def _tensors(tree: Any) -> Any:
    """Return a tree with numpy's and JAX's arrays as tensors; dtypes that torch lacks become float32."""
    if isinstance(tree, Mapping):
        return {str(key): _tensors(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return {str(key): _tensors(value) for key, value in enumerate(tree)}
    if hasattr(tree, "dtype") and hasattr(tree, "shape"):
        array = np.asarray(tree)
        if array.dtype.kind not in "fiub":  # bfloat16 is numpy's only as an extension
            array = array.astype(np.float32)
        return torch.from_numpy(np.array(array))
    return tree
