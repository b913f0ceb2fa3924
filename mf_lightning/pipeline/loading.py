"""Networks and what is told of them, out of checkpoints and exported folders; nothing in them is run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mf_lightning.autoencoders import PixelAutoencoder
from mf_lightning.checkpoints import read_header
from mf_lightning.checkpoints.averages import choose_weights, read_weights, told
from mf_lightning.checkpoints.weights import imported_name
from mf_lightning.data.shards import DatasetInfo, read_info
from mf_lightning.pipeline.autoencoder import check_channels, named_autoencoder
from mf_lightning.types import LatentSpec, UserError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT, FORMAT_VERSION = "mf_lightning generator", 1
OURS = "mf_lightning."


@dataclass(frozen=True)
class Description:
    """What a generator is besides its weights."""

    net: dict[str, Any]
    """Class and settings of the network, ``class_path`` and ``init_args``."""
    data: DatasetInfo
    """What it was trained on, without splits."""
    weights: str
    """Which weights they are: "raw", "ema 0.9999", and of imported ones what the source calls them."""
    step: int
    """Optimizer steps behind them."""
    flow_matching: bool = False
    """Whether the network only ever learned the instantaneous velocity, and cannot jump."""
    autoencoder: str | None = None
    """Where the autoencoder lies, if not where its id says."""
    origin: dict[str, Any] | None = None
    """What `import` or `phema` noted of weights that they made: source, container, format, weights; None for a run's own."""

    @property
    def imported(self) -> str | None:
        """Name of weights that no fit saved, as it stands in a protocol, "ema of meanflow-B4.pth"; None for a run's own."""
        return imported_name({"imported": self.origin})

    @property
    def name(self) -> str:
        """Name of the weights, whoever made them."""
        return self.imported or self.weights

    def plain(self) -> dict[str, Any]:
        """Return what ``config.json`` holds."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "net": self.net,
            "data": self.data.describe(),
            "weights": self.weights,
            "step": self.step,
            "flow_matching": self.flow_matching,
            "imported": self.origin,
        }


def beside(checkpoint: Path, name: str) -> Path | None:
    """Return a file of the run that a checkpoint is part of: in its folder or the one above; None if there is none."""
    for folder in (checkpoint.absolute().parent, checkpoint.absolute().parent.parent):
        if (folder / name).is_file():
            return folder / name
    return None


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """Return the ``config.yaml`` beside a checkpoint; empty where there is none that can be read."""
    file = beside(checkpoint, "config.yaml")
    try:
        found = yaml.safe_load(file.read_text(errors="replace")) if file else None
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def setting(settings: Any, *keys: str) -> Any:
    """Return a value deep inside settings, None where any key on the way is not there."""
    for key in keys:
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


def load_checkpoint(
    path: Path, *, weights: str | None, autoencoder: str | None, data: str | None, trust_net: bool
) -> tuple[nn.Module, Description]:
    """Return the network of a checkpoint, in evaluation mode on the CPU, and what is known of it.

    Args:
        path: a file, or a directory of shards.
        weights: "raw", or an average's decay; None takes the one that the run used.
        autoencoder: directory, hub name, or "pixel"; None takes the run's.
        data: directory of the data set; None takes what the checkpoint tells, else the run's ``config.yaml``.
        trust_net: also import network classes that are not this package's.

    Raises:
        UserError: it cannot be read, has no such weights, or does not tell enough.
    """
    header, settings = read_header(path), read_settings(path)
    if "net" not in header or "state_dict" not in header:
        raise UserError(
            f"Got '{path}', which does not tell its network, expected a checkpoint of mf_lightning. Make one of others' "
            "weights with `python -m mf_lightning import`."
        )
    use = setting(settings, "ema", "use") or (setting(settings, "ema", "decays") or [None])[0]
    name = choose_weights(weights, header.get("ema", {}), default=None if use is None else str(use))
    tensors, whole = read_weights(path, name)
    source = ("data", "init_args", "autoencoder", "init_args", "pretrained")
    flow_matching = (
        whole.get("fm_fraction", setting(settings, "model", "loss", "init_args", "fm_fraction")) == 1
        or setting(whole, "imported", "flow_matching") is True
    )
    origin = whole.get("imported")
    description = Description(
        net=whole["net"],
        data=_find_data(path, whole, settings, data=data, autoencoder=autoencoder),
        weights=told(name) if origin is None else origin["weights"],
        step=whole.get("global_step", 0),
        flow_matching=flow_matching,
        autoencoder=autoencoder or setting(settings, *source),
        origin=origin,
    )
    return build_net(description.net, tensors, trust_net=trust_net), description


def _find_data(
    path: Path, checkpoint: dict[str, Any], settings: dict[str, Any], *, data: str | None, autoencoder: str | None
) -> DatasetInfo:
    """Return the data set's description: of the option, the checkpoint, the run's settings, or the autoencoder's own scale."""
    init_args = checkpoint["net"]["init_args"]
    shape, classes = tuple(init_args["latent_shape"]), init_args["num_classes"]
    noted = setting(settings, "data", "init_args", "path")
    if data is not None:
        info = read_info(data)
    elif "data" in checkpoint:
        info = DatasetInfo.described(checkpoint["data"])
    elif isinstance(noted, str) and Path(noted, "dataset.json").is_file():
        info = read_info(noted)
    elif autoencoder is not None:
        found = named_autoencoder(autoencoder)
        check_channels(found, shape[0])
        scale = {"scale": found.scale, "shift": found.shift, "factor": getattr(found, "factor", 1)}
        info = _assumed(shape, classes, autoencoder=found.id, **scale)
    elif str(setting(settings, "data", "class_path")).endswith("SevenSegmentDataModule"):
        info = _assumed(shape, classes, autoencoder=PixelAutoencoder.id, scale=1.0, shift=0.0, factor=1)
    else:
        missing = f" ({noted}, which its config.yaml names, is not there)" if isinstance(noted, str) else ""
        raise UserError(
            f"Got '{path}', an older or imported checkpoint without a description of its data{missing}, expected the scale and "
            "shift of its latents and their autoencoder. Give the data set it was trained on, --data DIR, or an autoencoder "
            "whose own scale and shift are then taken, for example --autoencoder stabilityai/sd-vae-ft-mse."
        )
    if tuple(info.latent_shape) != shape:
        raise UserError(
            f"Got data with latents of shape {tuple(info.latent_shape)} for a network of {shape}, expected the same. Give the "
            "data set that the checkpoint was trained on."
        )
    return info


def _assumed(shape: tuple[int, ...], classes: int, *, autoencoder: str, scale: float, shift: float, factor: int) -> DatasetInfo:
    return DatasetInfo(
        kind="latents",
        latent_shape=shape,
        dtype="float32",
        flip=False,
        autoencoder=autoencoder,
        scale=scale,
        shift=shift,
        image_size=shape[-1] * factor,
        class_names=tuple(map(str, range(classes))),
    )


def build_net(described: dict[str, Any], tensors: dict[str, Tensor], *, trust_net: bool = False) -> nn.Module:
    """Return the network that a description names, with these weights, in evaluation mode, without gradients.

    Raises:
        UserError: see :func:`make_net`; weights that do not fit.
    """
    ours = described["class_path"].startswith(OURS)
    with torch.device("meta" if ours else "cpu"):  # meta: shapes without memory
        net = make_net(described, trust_net=trust_net)
    try:
        net.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise _cannot_be_made(described["class_path"], error) from error
    return net.eval().requires_grad_(False)


def make_net(described: dict[str, Any], *, trust_net: bool = False) -> nn.Module:
    """Return the network that a description names, with weights of its own.

    Raises:
        UserError: its class is another package's and not trusted, or not there; settings that do not fit.
    """
    path, init_args = described["class_path"], dict(described["init_args"])
    if not (path.startswith(OURS) or trust_net):
        raise UserError(
            f"Got a network of the class {path}, expected one of mf_lightning: importing another runs its code. If you trust "
            "it, say so: --trust_net=true (trust_net=True in Python)."
        )
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"{path} is no network")
        latent = LatentSpec(tuple(init_args.pop("latent_shape")), init_args.pop("num_classes"))
        return kind(latent, **init_args)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _cannot_be_made(path, error) from error


def _cannot_be_made(path: str, error: Exception) -> UserError:
    return UserError(
        f"Got a network {path} that cannot be made ({' '.join(str(error).split())[:300]}), expected its class, settings and "
        "weights to fit each other. Install the version that wrote it, or use another checkpoint."
    )


def parse_description(body: dict[str, Any], *, autoencoder: str | None = None) -> Description:
    """Return what ``config.json`` says.

    Raises:
        KeyError, TypeError, ValueError: another format, fields missing or wrong.
    """
    if body["format"] != FORMAT or body["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format {body['format']!r}, version {body['format_version']!r}")
    net, origin = body["net"], body.get("imported")
    _check_types(body, {"net": dict, "data": dict, "weights": str, "step": int, "flow_matching": bool})
    _check_types(net, {"class_path": str, "init_args": dict})
    if origin is not None:
        _check_types(body, {"imported": dict})
        _check_types(origin, {"source": str, "weights": str})
    return Description(
        net=net,
        data=DatasetInfo.described(body["data"]),
        weights=body["weights"],
        step=body["step"],
        flow_matching=body["flow_matching"],
        autoencoder=autoencoder,
        origin=origin,
    )


def _check_types(fields: dict[str, Any], wanted: dict[str, type]) -> None:
    for name, kind in wanted.items():
        if not isinstance(fields[name], kind):
            raise TypeError(f"{name} is {fields[name]!r}")


def load_folder(folder: Path, *, trust_net: bool) -> tuple[nn.Module, Description]:
    """Return the network of a folder that `export --to safetensors` or `--to diffusers` made, and what is known of it.

    Raises:
        UserError: no such folder, files missing, damaged, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    inside = folder / "transformer" if (folder / "model_index.json").is_file() else folder  # diffusers' layout
    file = inside / CONFIG_FILE
    how = "Make one with `python -m mf_lightning export CKPT OUT --to safetensors`."
    if not file.is_file():
        beside = "" if folder.is_dir() else "; for a checkpoint there is MeanFlowPipeline.from_checkpoint"
        raise UserError(f"Got '{folder}' without {CONFIG_FILE}, expected a folder that export made{beside}. {how}")
    try:
        body = json.loads(file.read_text())
        body = body if inside == folder else body["generator"]
        description = parse_description(body, autoencoder=str(folder / "vae") if (folder / "vae").is_dir() else None)
        tensors = load_file(inside / (WEIGHTS_FILE if inside == folder else "diffusion_pytorch_model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"Got '{folder}', which cannot be read ({reason}), expected all that export wrote. {how}") from error
    return build_net(
        description.net, {key.removeprefix("net."): value for key, value in tensors.items()}, trust_net=trust_net
    ), description
