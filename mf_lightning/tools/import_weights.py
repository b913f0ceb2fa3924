"""`python -m mf_lightning import`: weights of another project, or of another run, as a checkpoint that starts a fit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mf_lightning.checkpoints import CHECKPOINT_FORMAT, describe_net, is_sharded_checkpoint, read_checkpoint, write_checkpoint
from mf_lightning.interop.conversion import (
    NAMINGS,
    Account,
    check_training,
    choose_weights,
    convert,
    detect_naming,
)
from mf_lightning.interop.reading import SourceFile, read_source
from mf_lightning.nets import SiT
from mf_lightning.nets.embed import position_table
from mf_lightning.nets.sit import SIZES
from mf_lightning.types import LatentSpec, UserError

OFFICIAL_SIDE = 32
"""Side of the latents of the official JAX networks (ImageNet at 256x256), which store no position table."""

Format = Literal["auto", "sit", "repa", "meanflow", "zhuyu", "flax", "flow-matching"]


def import_weights(
    source: Path,
    out: Path,
    format: Format = "auto",
    weights: str = "auto",
    num_heads: int | None = None,
    latent_size: int | None = None,
    num_classes: int | None = None,
    allow_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Make a checkpoint of others' weights: `fit --model.init_from=OUT` begins there, `test --ckpt_path=OUT` scores it.

    Args:
        source: .pt, .pth, .safetensors, a flax msgpack file, a folder that orbax wrote, or a checkpoint of this project.
        out: .ckpt file to write.
        format: whose names, and which way time runs. "sit" willisma/SiT; "repa" REPA; "meanflow" this project and HaoyiZhu;
            "zhuyu" zhuyu-cs; "flax" the official JAX code; "flow-matching" this project's network, trained with
            fm_fraction 1, whose h path is silenced. "auto" tells them by their keys, and asks where those do not tell.
        weights: "ema", "raw", or an average's decay; "auto" takes the average where there is one.
        num_heads: attention heads, for networks that are not of the papers' sizes S, B, M, L, XL: weights do not tell them.
        latent_size: side of a latent, for a source without position table (flax); without it 32, the official one's.
        num_classes: classes, to be compared with the label table; a table without a null row gets one, the mean of the others.
        allow_code: read a pickle that needs code, which runs it. Only for files whose maker you trust.
        overwrite: replace an existing OUT.

    Raises:
        UserError: what it is, what was expected, and what to do.
    """
    if out.suffix != ".ckpt":
        raise UserError(f"Got OUT = {out}, expected a name that ends in .ckpt.")
    if out.exists() and not overwrite:
        raise UserError(f"Got OUT = {out}, which exists, expected a new file. Give another name, or --overwrite=true.")
    found = _read(source, allow_code)
    check_training(found.tree)
    taken, state, left = choose_weights(found.tree, weights)
    own_flow_matching = format == "auto" and found.tree.get("fm_fraction") == 1
    naming = "flow-matching" if own_flow_matching else detect_naming(state) if format == "auto" else format
    ours, account = convert(state, naming)
    saved = _own_settings(found)
    _complete_labels(ours, num_classes, account)
    settings = _settings(ours, saved, num_heads, latent_size)
    net = _fit_into(ours, settings, account)
    origin = {
        "source": source.name,
        "container": found.container,
        "format": naming,
        "weights": taken,
        "flow_matching": NAMINGS[naming].flow_matching,
    }
    kept = {key: found.tree[key] for key in ("data",) if key in found.tree}  # this project's checkpoints tell of their data
    _write(out, net, ours, {"imported": origin, **kept})
    _tell(source, out, origin, net, account, left)


def _read(source: Path, allow_code: bool) -> SourceFile:
    if is_sharded_checkpoint(source):
        return SourceFile("sharded checkpoint", read_checkpoint(source))
    found = read_source(source, allow_code=allow_code)
    if found.tree.get("format_version") == CHECKPOINT_FORMAT and "net" in found.tree:
        read_checkpoint(source, mmap=True)  # compares its checksum
    return found


def _own_settings(found: SourceFile) -> dict[str, Any]:
    """Return the network's settings where this project wrote them beside the weights; else nothing."""
    if found.container == "safetensors" and "net" in found.metadata:
        net = json.loads(found.metadata["net"])
    else:
        net = found.tree.get("net", {})
    if not isinstance(net, Mapping) or "init_args" not in net:
        return {}
    if net["class_path"] != f"{SiT.__module__}.{SiT.__qualname__}":
        raise UserError(
            f"Got weights of {net['class_path']}, expected those of a SiT: it is the only network that is imported."
        )
    return dict(net["init_args"])


def _complete_labels(state: dict[str, Tensor], num_classes: int | None, account: Account) -> None:
    name = "y_embedder.embedding_table.weight"
    rows = len(state[name]) if name in state else 1
    if num_classes is None or num_classes == rows - 1:
        return
    if num_classes != rows:
        raise UserError(
            f"Got --num_classes={num_classes} for a label table of {rows} rows, expected {rows - 1} (the last row is the null "
            f"label) or {rows} (no null row). Leave it out to take {rows - 1}."
        )
    state[name] = torch.cat([state[name], state[name].mean(dim=0, keepdim=True)])
    account.converted.append(f"{name}: a null row added, the mean of the {rows} classes")


def _settings(state: Mapping[str, Tensor], saved: dict[str, Any], num_heads: int | None, side: int | None) -> dict[str, Any]:
    """Return what decides the network: read from shapes, and where they do not tell from what was saved or given."""
    patches = _shape(state, "x_embedder.proj.weight", 4)
    hidden_size, channels, patch_size, _ = patches
    blocks = [name.split(".")[1] for name in state if name.startswith("blocks.")]
    depth = 1 + max((int(number) for number in blocks if number.isdecimal()), default=-1)
    if "pos_embed" in state:
        tokens = _shape(state, "pos_embed", 3)[1]
        table_side = math.isqrt(tokens) * patch_size
        if math.isqrt(tokens) ** 2 != tokens or (side not in (None, table_side)):
            raise UserError(
                f"Got a position table of {tokens} tokens with --latent_size={side}, expected a square of them, "
                f"{table_side // patch_size} x {table_side // patch_size} patches. Leave --latent_size out."
            )
        side = table_side
    side = side or OFFICIAL_SIDE
    labels = "y_embedder.embedding_table.weight"
    size = next((heads for deep, wide, heads in SIZES.values() if (deep, wide) == (depth, hidden_size)), None)
    heads = num_heads or saved.get("num_heads") or size
    if heads is None:
        known = ", ".join(f"{name} {deep} x {wide}" for name, (deep, wide, _) in SIZES.items())
        raise UserError(
            f"Got a network of depth {depth} and width {hidden_size}, expected a known size ({known}), since weights do not "
            "tell the number of attention heads. Give it: --num_heads=N."
        )
    return {
        "latent": LatentSpec(tuple(saved.get("latent_shape", (channels, side, side))), len(state.get(labels, [0])) - 1),
        "patch_size": patch_size,
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": heads,
        "mlp_ratio": saved.get("mlp_ratio", _shape(state, "blocks.0.mlp.fc1.weight", 2)[0] / hidden_size),
        "time_inputs": saved.get("time_inputs", "t,h"),
        "qk_norm": any(".attn.q_norm." in name for name in state),
    }


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state or state[name].dim() != dimensions:
        got = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
        raise UserError(f"Got '{name}' {got}, expected {dimensions} dimensions: a SiT's. Check the file, or give --format.")
    return tuple(state[name].shape)


def _fit_into(state: dict[str, Tensor], settings: dict[str, Any], account: Account) -> SiT:
    """Return the network, without memory, that the weights fit key by key; a position table that was not stored is added.

    Raises:
        UserError: keys missing or left over, shapes that differ, values that are no numbers.
    """
    with torch.device("meta"):
        net = SiT(**settings)
    if "pos_embed" not in state:
        state["pos_embed"] = position_table(settings["hidden_size"], *net.grid)
        account.added.append("pos_embed: the sin-cos table, which the source computes")
    expected = net.state_dict()
    missing, left = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [
        f"{name} {tuple(state[name].shape)} where {tuple(value.shape)} fits"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    problems = {
        "missing": missing,
        "without a place": left,
        "of another shape": wrong,
        "with values that are no numbers": broken,
    }
    told = "; ".join(f"{len(keys)} {what}: {_few(keys)}" for what, keys in problems.items() if keys)
    if told:
        raise UserError(
            f"Got weights that do not fit a SiT of depth {settings['depth']} and width {settings['hidden_size']} ({told}), "
            "expected every one in its place. The file is of another network, incomplete, or --format is another's."
        )
    return net


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _write(out: Path, net: SiT, state: dict[str, Tensor], told: dict[str, Any]) -> None:
    import lightning

    checkpoint = {
        "pytorch-lightning_version": lightning.__version__,
        "format_version": CHECKPOINT_FORMAT,
        "epoch": 0,
        "global_step": 0,
        "net": describe_net(net),
        "state_dict": {f"net.{name}": state[name].contiguous().clone() for name in net.state_dict()},
        "callbacks": {},  # or Lightning asks none of them to look at the checkpoint
        "ema": {"updates": 0, "weights": {}},
        **told,
    }
    write_checkpoint(checkpoint, out)


def _tell(source: Path, out: Path, origin: dict[str, Any], net: SiT, account: Account, left: list[str]) -> None:
    config = net.config
    size = next(
        (name for name, shape in SIZES.items() if shape == tuple(config[k] for k in ("depth", "hidden_size", "num_heads"))),
        None,
    )
    size = f"SiT-{size}/{config['patch_size']}" if size else "SiT"
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{source}: {origin['container']}, names of {NAMINGS[origin['format']].source} (--format={origin['format']})")
    print(f"  weights: {origin['weights']}" + (f"; left aside: {', '.join(left)}" if left else ""))
    print(
        f"  network: {size}, {parameters:.1f} M parameters, patch {config['patch_size']}, depth {config['depth']}, width "
        f"{config['hidden_size']}, {config['num_heads']} heads, latents {' x '.join(map(str, config['latent_shape']))}, "
        + (f"{config['num_classes']} classes and the null label" if config["num_classes"] else "no classes")
    )
    for what in ("dropped", "added", "converted"):
        keys = getattr(account, what)
        print(f"  {what}: {len(keys)} keys" + "".join(f"\n    {line}" for line in sorted(keys)))
    if origin["flow_matching"]:
        print("  It is a flow-matching network: u(z, r, t) = v(z, t) whatever r is, until it has been trained with MeanFlow.")
    print(f"{out}: train from it with --model.init_from={out}, score it with test --ckpt_path={out}")
