"""`python -m mf_lightning import`: weights of another project, or of another run, as a checkpoint that starts a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mf_lightning.checkpoints import CHECKPOINT_FORMAT, describe_net, is_sharded_checkpoint, read_checkpoint, write_checkpoint
from mf_lightning.checkpoints.metadata import Told, told_by_checkpoint, told_by_metadata
from mf_lightning.interop.conversion import NAMINGS, Account, Taken, check_training, choose_weights, convert, detect_naming
from mf_lightning.interop.reading import SourceFile, read_source
from mf_lightning.nets import SiT
from mf_lightning.nets.embed import position_table
from mf_lightning.nets.sit import SIZES
from mf_lightning.pipeline.loading import WEIGHTS_FILE, load_folder, make_net
from mf_lightning.tools.export import is_export
from mf_lightning.types import LatentSpec, UserError

OFFICIAL_SIDE = 32
"""Side of the latents of the official JAX networks (ImageNet at 256x256), which store no position table."""
OF_DIFFUSERS = "diffusion_pytorch_model.safetensors"
"""Weights of an export to diffusers, in a folder inside."""

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
        source: .pt, .pth, .safetensors, a flax msgpack file, a folder that orbax wrote, or of this project a checkpoint, or a
            folder that export made.
        out: .ckpt file to write.
        format: whose names, and which way time runs. "sit" willisma/SiT; "repa" REPA; "meanflow" this project and HaoyiZhu;
            "zhuyu" zhuyu-cs; "flax" the official JAX code; "flow-matching" this project's network, trained with
            fm_fraction 1, whose h path is silenced. "auto" tells them by their keys, and asks where those do not tell.
        weights: "ema", "raw", or an average's decay; "auto" takes the average where there is one.
        num_heads: attention heads, for networks that are not of the papers' sizes S, B, M, L, XL: others' weights do not tell
            them.
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
    _check_numbers(num_heads=num_heads, latent_size=latent_size, num_classes=num_classes)
    found, told = _read(source, allow_code)
    check_training(found.tree)
    taken, state, left = choose_weights(found.tree, weights, told and told.weights)
    naming = _naming(format, told, state)
    ours, account = convert(state, naming, own=told is not None)
    if told is None:
        _complete_labels(ours, num_classes, account)
        net = _net_by_shapes(ours, num_heads, latent_size)
    else:
        net = _net_as_told(told, num_heads=num_heads, latent_size=latent_size, num_classes=num_classes)
    _check_fit(ours, net, account)
    origin = {
        "source": source.absolute().name,
        "container": found.container,
        "format": naming,
        "weights": taken.name,
        "flow_matching": NAMINGS[naming].flow_matching,
    }
    data = {} if told is None or told.data is None else {"data": told.data}
    _write(out, net, ours, {"imported": origin, **data})
    _tell(source, out, origin, taken, net, account, left)


def _check_numbers(**given: int | None) -> None:
    for name, value in given.items():
        least = 0 if name == "num_classes" else 1
        if value is not None and value < least:
            raise UserError(f"Got --{name}={value}, expected at least {least}. Leave it out where the file tells it.")


def _read(source: Path, allow_code: bool) -> tuple[SourceFile, Told | None]:
    """Return what a source holds, and what it tells of itself if it is this project's."""
    if (folder := _exported(source)) is not None:
        net, kept = load_folder(folder, trust_net=False)
        told = Told(kept.net, kept.data.describe(), kept.weights, kept.flow_matching)
        found = SourceFile("exported folder", net.state_dict())
    elif is_sharded_checkpoint(source):
        found = SourceFile("sharded checkpoint", read_checkpoint(source))
        told = told_by_checkpoint(found.tree)
    else:
        found, told = read_source(source, allow_code=allow_code), None
        if found.container == "safetensors":
            told = told_by_metadata(found.metadata)
        elif found.tree.get("format_version") == CHECKPOINT_FORMAT and "net" in found.tree:
            read_checkpoint(source, mmap=True)  # compares its checksum
            told = told_by_checkpoint(found.tree)
    sit = f"{SiT.__module__}.{SiT.__qualname__}"
    if told is not None and told.net["class_path"] != sit:
        raise UserError(
            f"Got weights of {told.net['class_path']}, expected those of a SiT: it is the only network that is imported."
        )
    return found, told


def _exported(source: Path) -> Path | None:
    """Return the folder that `export` made, of which the source is all, or the weights."""
    source = source.absolute()
    if source.is_dir():
        holds = is_sharded_checkpoint(source)
        return source if not holds and (is_export(source) or (source / WEIGHTS_FILE).is_file()) else None
    folder = {WEIGHTS_FILE: source.parent, OF_DIFFUSERS: source.parent.parent}.get(source.name)
    return folder if folder is not None and source.is_file() and is_export(folder) else None


def _naming(format: Format, told: Told | None, state: Mapping[str, Tensor]) -> str:
    """Return whose names the weights have: what the file tells, before what its keys look like."""
    if told is None:
        return detect_naming(state) if format == "auto" else format
    own = {True: "flow-matching", False: "meanflow", None: None}[told.flow_matching]
    naming = own if format == "auto" else format
    if naming is None:
        raise UserError(
            "Got weights of this project that do not tell whether they were trained with fm_fraction 1 (an older version wrote "
            "them), expected to be told: give --format=flow-matching if they were, else --format=meanflow."
        )
    if naming not in ("meanflow", "flow-matching") or (naming, own) == ("meanflow", "flow-matching"):
        raise UserError(
            f"Got --format={naming} for weights of this project, expected {own or 'meanflow or flow-matching'}, as the file "
            "tells. Leave --format out."
        )
    times = told.net["init_args"].get("time_inputs", "t,h")
    if naming == "flow-matching" and times != "t,h":
        raise UserError(
            f"Got a flow-matching network with time_inputs = {times}, expected t,h: what others say of r where r < t was never "
            "taught, and cannot be silenced. Train the flow-matching network with time_inputs: t,h."
        )
    return naming


def _net_as_told(told: Told, **given: int | None) -> SiT:
    """Return the network, without memory, by the settings that its file tells.

    Raises:
        UserError: they make no network, or an option says otherwise.
    """
    with torch.device("meta"):
        net = make_net(told.net)
    _, height, width = net.config["latent_shape"]
    side = height if height == width else f"{height} x {width}"
    for name, said in {**net.config, "latent_size": side}.items():
        if given.get(name, said) not in (None, said):
            raise UserError(f"Got --{name}={given[name]} for weights whose file tells {said}, expected the same. Leave it out.")
    return net


def _complete_labels(state: dict[str, Tensor], num_classes: int | None, account: Account) -> None:
    name = "y_embedder.embedding_table.weight"
    rows = _shape(state, name, 2)[0] if name in state else 1
    if num_classes is None or num_classes == rows - 1:
        return
    if name not in state or num_classes != rows:
        table = f"for a label table of {rows} rows" if name in state else "for a network without labels"
        rest = f" (the last row is the null label) or {rows} (no null row)" if name in state else ""
        raise UserError(f"Got --num_classes={num_classes} {table}, expected {rows - 1}{rest}. Leave it out to take {rows - 1}.")
    state[name] = torch.cat([state[name], state[name].mean(dim=0, keepdim=True)])
    account.converted.append(f"{name}: a null row added, the mean of the {rows} classes")


def _net_by_shapes(state: Mapping[str, Tensor], num_heads: int | None, side: int | None) -> SiT:
    """Return the network, without memory, that weights of this shape are of."""
    hidden_size, channels, patch_size, _ = _shape(state, "x_embedder.proj.weight", 4)
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
    labels = "y_embedder.embedding_table.weight"
    size = next((heads for deep, wide, heads in SIZES.values() if (deep, wide) == (depth, hidden_size)), None)
    heads = num_heads or size
    if heads is None:
        known = ", ".join(f"{name} {deep} x {wide}" for name, (deep, wide, _) in SIZES.items())
        raise UserError(
            f"Got a network of depth {depth} and width {hidden_size}, expected a known size ({known}), since weights do not "
            "tell the number of attention heads. Give it: --num_heads=N."
        )
    side = OFFICIAL_SIDE if side is None else side
    with torch.device("meta"):
        return SiT(
            LatentSpec((channels, side, side), len(state[labels]) - 1 if labels in state else 0),
            patch_size=patch_size,
            depth=depth,
            hidden_size=hidden_size,
            num_heads=heads,
            mlp_ratio=_shape(state, "blocks.0.mlp.fc1.weight", 2)[0] / hidden_size,
        )


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state or state[name].dim() != dimensions:
        got = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
        raise UserError(f"Got '{name}' {got}, expected {dimensions} dimensions: a SiT's. Check the file, or give --format.")
    return tuple(state[name].shape)


def _check_fit(state: dict[str, Tensor], net: SiT, account: Account) -> None:
    """Compare weights with a network, key by key; a position table that was not stored is added.

    Raises:
        UserError: keys missing or left over, shapes that differ, values that are no numbers.
    """
    if "pos_embed" not in state:
        state["pos_embed"] = position_table(net.config["hidden_size"], *net.grid)
        account.added.append("pos_embed: the sin-cos table, which the source computes")
    expected = net.state_dict()
    missing, left = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [
        f"{name} {tuple(state[name].shape)} where {tuple(value.shape)} fits"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    broken = [name for name, value in state.items() if not (value.is_floating_point() and value.isfinite().all())]
    problems = {
        "missing": missing,
        "without a place": left,
        "of another shape": wrong,
        "with values that are no numbers": broken,
    }
    told = "; ".join(f"{len(keys)} {what}: {_few(keys)}" for what, keys in problems.items() if keys)
    if told:
        raise UserError(
            f"Got weights that do not fit a SiT of depth {net.config['depth']} and width {net.config['hidden_size']} ({told}), "
            "expected every one in its place. The file is of another network, incomplete, or --format is another's."
        )


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


def _tell(source: Path, out: Path, origin: dict[str, Any], taken: Taken, net: SiT, account: Account, left: list[str]) -> None:
    config = net.config
    size = next(
        (name for name, shape in SIZES.items() if shape == tuple(config[k] for k in ("depth", "hidden_size", "num_heads"))),
        None,
    )
    size = f"SiT-{size}/{config['patch_size']}" if size else "SiT"
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{source}: {origin['container']}, names of {NAMINGS[origin['format']].source} (--format={origin['format']})")
    print(f"  weights: {taken}" + (f"; left aside: {', '.join(left)}" if left else ""))
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
