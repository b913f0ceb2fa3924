"""Stored parameters written as their repositories write them, and taken back through ``python -m mf_lightning import``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_lightning.__main__ import main
from mf_lightning.checkpoints import read_checkpoint
from mf_lightning.nets import SiT
from mf_lightning.types import LatentSpec

State = Mapping[str, Tensor]


def imported(file: Path, out: Path, *options: str) -> tuple[SiT, str]:
    """Return the network that the command makes of a file or folder, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(["import", str(file), str(out), "--overwrite=true", *options])
        except SystemExit as end:
            raise RuntimeError(printed.getvalue()) from end
    return network(out), printed.getvalue()


def network(path: Path) -> SiT:
    """Return the network of a checkpoint, strictly loaded."""
    checkpoint = read_checkpoint(path)
    settings = dict(checkpoint["net"]["init_args"])
    spec = LatentSpec(tuple(settings.pop("latent_shape")), settings.pop("num_classes"))
    net = SiT(spec, **settings)
    net.load_state_dict({name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()}, strict=True)
    return net.eval()


def written_by(kind: str, state: State, folder: Path) -> tuple[Path, list[str]]:
    """Write parameters as a repository does; return the file and the options that its names do not make superfluous."""
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    options = argparse.Namespace(path_type="linear", prediction="v")
    if kind == "haoyi":
        return _saved(dict(state), folder), []
    if kind == "willisma_sigma":
        return _saved({"model": zeros, "ema": dict(state), "opt": {}, "args": options}, folder), []
    if kind == "willisma_nosigma":
        return _saved(dict(state), folder), ["--format=sit"]
    if kind == "repa":  # the same network; REPA's own time runs as ours, and its loss has projectors
        projectors = {f"projectors.0.{i}.{leaf}": torch.ones(3) for i in (0, 2, 4) for leaf in ("weight", "bias")}
        return _saved({"model": zeros, "ema": {**state, **projectors}, "opt": {}, "args": options, "steps": 7}, folder), []
    assert kind == "zhuyu"
    return _saved({"model": zeros, "ema": dict(state), "opt": {}, "args": options, "steps": 7}, folder), []


def _saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "theirs.pt")
    return folder / "theirs.pt"


def through_import(kind: str, state: State, num_heads: int, *, safetensors: bool = False) -> SiT:
    """Return the network that importing a repository's file gives."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, options = written_by(kind, state, folder)
        if safetensors:
            from safetensors.torch import save_file

            file = folder / "theirs.safetensors"
            save_file({key: value.contiguous() for key, value in state.items()}, file)
        return imported(file, folder / "ours.ckpt", f"--num_heads={num_heads}", *options)[0]


JAX = all(importlib.util.find_spec(package) for package in ("jax", "flax", "orbax"))
"""Whether the packages of the extra ``jax`` are there."""


def write_flax(arrays: State, folder: Path, *, container: str) -> Path:
    """Write flax parameters (paths below ``params/net/``) as the official code's training state, in msgpack or orbax."""
    params: dict[str, Any] = {}
    for path, value in arrays.items():
        *parts, leaf = f"net/{path}".split("/")
        node = params
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = value.numpy()
    import jax

    raw = jax.tree.map(lambda value: 0 * value, params)
    tree = {"step": 7, "params": raw, "opt_state": {"mu": raw}, "ema_params": params}
    if container == "msgpack":
        import flax.serialization

        (folder / "checkpoint_7").write_bytes(flax.serialization.to_bytes(tree))
        return folder / "checkpoint_7"
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as writer:
        writer.save((folder / "orbax" / "checkpoint_7").absolute(), tree)
    return folder / "orbax"
