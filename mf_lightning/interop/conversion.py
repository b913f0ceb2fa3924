"""Which weights of a file are meant, whose names they have, and how they become ours, with an account of every key."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mf_lightning.interop import flax_names, public_sit
from mf_lightning.interop.reading import flatten
from mf_lightning.types import UserError

AVERAGED = ("ema", "ema_params", "model_ema", "ema_model", "ema_state_dict")
RAW = ("model", "params", "state_dict", "module", "net")
"""Where files keep averaged and raw weights, in the order in which they are looked for."""

PREFIXES = ("module.", "_orig_mod.", "net.", "model.", "ema.")
"""What wrappers put before every name."""

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Naming:
    """Whose names a state dict has."""

    source: str
    convert: Callable[[State], dict[str, Tensor]]
    reasons: Mapping[str, str]
    """Why a key whose name begins so is dropped, added or converted; "" is every other one."""
    flow_matching: bool = False
    """Whether the network knows one time only."""


_SILENT = {"h_embedder.": "new: it says the same whatever h is, so u(z, r, t) = v(z, t)"}

NAMINGS: dict[str, Naming] = {
    "sit": Naming(
        "willisma/SiT, flow matching with time and velocity the other way",
        lambda state: public_sit.with_silent_h(public_sit.reverse_time(public_sit.without_learned_sigma(state))),
        {
            **_SILENT,
            "t_embedder.mlp.0.": "rotated: t is now 1 - t",
            "final_layer.linear.": "negated: noise - data",
        },
        flow_matching=True,
    ),
    "repa": Naming(
        "REPA, flow matching with time and velocity as here",
        public_sit.from_repa,
        {**_SILENT, "projectors.": "only REPA's loss uses it", "decoder_blocks.": "counted on"},
        flow_matching=True,
    ),
    "meanflow": Naming("this project, HaoyiZhu", public_sit.from_haoyi, {}),
    "zhuyu": Naming("zhuyu-cs", public_sit.from_zhuyu, {"r_embedder.": "it is given t - r"}),
    "flax": Naming("the official JAX code", flax_names.from_flax, {"": "renamed; kernels transposed"}),
    "flow-matching": Naming(
        "this project, trained with fm_fraction 1, or any SiT with time and velocity as here",
        public_sit.with_silent_h,
        {"h_embedder.": _SILENT["h_embedder."].replace("new: ", "")},
        flow_matching=True,
    ),
}


@dataclass(frozen=True)
class Account:
    """What became of every key, as lines for people."""

    dropped: list[str]
    added: list[str]
    converted: list[str]


@dataclass(frozen=True)
class Taken:
    """One set of a file's weights."""

    name: str
    """What they are: "raw", "ema", "ema 0.9999", "phema 0.15"; "unnamed" where a file holds one set and does not tell."""
    key: str
    """Where in the file they are; "" for its top, or this project's averages."""
    tree: Mapping[str, Any]

    @property
    def is_average(self) -> bool:
        """Whether they are known to be averages."""
        return self.name.startswith(("ema", "phema"))

    def __str__(self) -> str:
        return f"{self.name} ({self.key})" if self.key else self.name


def choose_weights(tree: Mapping[str, Any], asked: str, told: str | None = None) -> tuple[Taken, dict[str, Tensor], list[str]]:
    """Return which weights of a file are taken, their tensors, and the names of what is left aside.

    Args:
        tree: the file.
        asked: "auto" takes averaged weights where there are any; "ema" and "raw" insist; a number is an average's decay.
        told: what the file itself says that its one set of weights is.

    Raises:
        UserError: no weights, not those that were asked for, or several averages.
    """
    sets = _sets(tree, told)
    averages, others = [one for one in sets if one.is_average], [one for one in sets if not one.is_average]
    if asked == "raw" or (asked == "auto" and not averages):
        found = others
    else:
        found = [one for one in averages if asked in ("auto", "ema") or _is(one.name, asked)]
    if not found or (len(found) > 1 and found[0].is_average):
        have = ", ".join(map(str, sets)) or f"no tensors under {', '.join(map(str, list(tree)[:8])) or 'any key'}"
        expected = "one of them to be chosen" if found else "weights" if asked == "auto" else f"--weights={asked} among them"
        raise UserError(
            f"Got a file with {have}, expected {expected}. Choose with --weights (raw, ema, or an average's decay), or give "
            "the file that has them."
        )
    taken = found[0]
    left = [str(one) for one in sets if one is not taken]
    left += sorted(str(key) for key in tree if taken.tree is not tree and key not in (*AVERAGED, *RAW))
    buffers = {}
    if taken.is_average and not taken.key and taken.tree is not tree and isinstance(tree.get("state_dict"), Mapping):
        buffers = {key: value for key, value in flatten(tree["state_dict"]).items() if key.endswith("pos_embed")}
    return taken, _without_prefixes({**_without_prefixes(buffers), **_without_prefixes(flatten(taken.tree))}), left


def _sets(tree: Mapping[str, Any], told: str | None) -> list[Taken]:
    """Return the sets of weights in a file, averages first."""
    own = tree["ema"].get("weights") if isinstance(tree.get("ema"), Mapping) else None
    if isinstance(own, Mapping) and all(isinstance(weights, Mapping) for weights in own.values()):  # this project's: by decay
        sets = [Taken(f"ema {decay}", "", weights) for decay, weights in own.items()]
    else:
        sets = [Taken("ema", key, tree[key]) for key in AVERAGED if isinstance(tree.get(key), Mapping) and flatten(tree[key])]
    sets += [Taken(told or "raw", key, tree[key]) for key in RAW if isinstance(tree.get(key), Mapping) and flatten(tree[key])]
    return sets or ([Taken(told or "unnamed", "", tree)] if flatten(tree) else [])


def _is(name: str, asked: str) -> bool:
    try:
        return float(name.removeprefix("ema ")) == float(asked)
    except ValueError:
        return name == asked


def _without_prefixes(state: State) -> dict[str, Tensor]:
    state, changed = dict(state), True
    while changed and state:
        found = [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)]
        changed = bool(found)
        if changed:
            state = {name.removeprefix(found[0]): value for name, value in state.items()}
    return state


def detect_naming(state: State) -> str:
    """Return whose names a state dict has.

    Raises:
        UserError: nobody's that is known, or a flow-matching network whose direction of time nothing tells.
    """
    names = list(state)
    has = {word: any(name.startswith(word) for name in names) for word in ("h_embedder.", "r_embedder.", "projectors.")}
    if any("/" in name for name in names):
        return "flax"
    if "x_embedder.proj.weight" not in state or "final_layer.linear.weight" not in state:
        raise UserError(
            f"Got {len(names)} tensors that no known SiT has ({', '.join(names[:4])}, ...), expected x_embedder, t_embedder, "
            f"blocks and final_layer, or the official flax paths. Known are: {', '.join(NAMINGS)}."
        )
    if has["h_embedder."]:
        return "meanflow"
    if has["r_embedder."]:
        return "zhuyu"
    if has["projectors."] or any(name.startswith("decoder_blocks.") for name in names):
        return "repa"
    patches, last = state["x_embedder.proj.weight"].shape, state["final_layer.linear.weight"].shape
    if len(patches) == 4 and len(last) == 2 and last[0] == 2 * patches[1] * patches[2] ** 2:
        return "sit"
    raise UserError(
        "Got a flow-matching SiT without learned variances, expected to be told which way its time runs, for weights do not: "
        "give --format=sit (willisma/SiT: t = 1 is data, velocity = data - noise) or --format=repa (t = 1 is noise, as here)."
    )


def check_training(tree: Mapping[str, Any]) -> None:
    """Refuse what its own options call another path or prediction than the straight one with velocities.

    Raises:
        UserError: naming the option.
    """
    kept = tree.get("args", {})
    options = kept if isinstance(kept, Mapping) else vars(kept) if hasattr(kept, "__dict__") else {}
    for name, allowed in (("path_type", ("linear", "Linear")), ("prediction", ("v", "velocity"))):
        if options.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"Got a network trained with {name} = {options[name]}, expected {' or '.join(allowed)}: MeanFlow's path is "
                "straight and its network gives velocities. It cannot be converted; take one that was trained so."
            )


def convert(state: State, naming: str, *, own: bool = False) -> tuple[dict[str, Tensor], Account]:
    """Return the parameters under our names, in float32, with an account of what was dropped, added and converted.

    Args:
        state: parameters by their names in the file.
        naming: whose names they are, a key of ``NAMINGS``.
        own: the file says itself that this project trained the network.

    Raises:
        UserError: naming what a network of this kind must have, or must not.
    """
    how = NAMINGS[naming]
    if not own and any(re.search(r"attn[./][qk]_norm[./]", name) for name in state):
        raise UserError(
            "Got a network with norms of queries and keys (qk_norm), expected one without: the public code's norms have "
            "another epsilon than this project's, so the result would be another network. One that this project trained is "
            "taken from its checkpoint, from consolidate's file, or from an export, which say so."
        )
    if naming != "flax" and "t_embedder.mlp.0.weight" not in state:
        raise UserError(f"Got weights without t_embedder.mlp.0.weight, expected the names of {how.source}. Check --format.")
    wide = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    ours = how.convert(wide)
    source_of = _sources(wide, ours)
    account = Account([], [], [])
    for name, value in wide.items():
        if name not in source_of.values():
            account.dropped.append(f"{name}{_reason(how, name)}")
        if value.dtype != state[name].dtype:
            account.converted.append(f"{name}: {str(state[name].dtype).removeprefix('torch.')} => float32")
    for name, value in ours.items():
        old = source_of.get(name)
        if old is not None and value.numel() < wide[old].numel():
            account.dropped.append(f"{old}: {len(wide[old]) - len(value)} of its {len(wide[old])} rows, the learned variances")
        if old is None:
            account.added.append(f"{name}{_reason(how, name)}")
        elif old != name or value is not wide[old]:
            account.converted.append(f"{name if old == name else f'{old} => {name}'}{_reason(how, old) or _reason(how, name)}")
    return ours, account


def _sources(old: State, new: State) -> dict[str, str]:
    """Return from which key each of ours is: the same tensor, a view of it, or the same name."""
    by_memory = {(value.data_ptr(), value.numel()): name for name, value in old.items()}
    found = {}
    for name, value in new.items():
        if name in old:
            found[name] = name
        elif (same := by_memory.get((value.data_ptr(), value.numel()))) is not None:
            found[name] = same
    return found


def _reason(how: Naming, name: str) -> str:
    reason = next((why for prefix, why in how.reasons.items() if prefix and name.startswith(prefix)), how.reasons.get("", ""))
    return f": {reason}" if reason else ""
