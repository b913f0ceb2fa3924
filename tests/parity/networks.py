"""Networks built from stored parameters, and the sit_forward files: every size is read from the arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mf_lightning.interop import public_sit
from mf_lightning.nets import SiT
from mf_lightning.nets.dual import Dual
from mf_lightning.nets.embed import position_table
from mf_lightning.types import LatentSpec
from tests.parity.importing import through_import
from tests.parity.report import Checks, Oracle

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

CONVERTERS: dict[str, Convert] = {
    "haoyi": public_sit.from_haoyi,
    "zhuyu": public_sit.from_zhuyu,
    "willisma_nosigma": public_sit.from_willisma,
    "willisma_sigma": public_sit.from_willisma,
}
"""Ending of a sit_forward file's name => how its state dict becomes ours."""


def build(state: Mapping[str, Tensor], *, num_heads: int, attention: str = "fused") -> SiT:
    """Return our network with these parameters, loaded strictly; the shapes show all sizes but the number of heads."""
    hidden_size, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1]) * patch_size
    num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
    net = SiT(
        LatentSpec((channels, side, side), num_classes),
        patch_size=patch_size,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        hidden_size=hidden_size,
        num_heads=num_heads,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / hidden_size,
        attention=attention,
    )
    net.load_state_dict(dict(state), strict=True)
    return net.eval()


def own_table(net: SiT) -> Tensor:
    """Return the position table that we compute for this network."""
    return position_table(net.pos_embed.shape[-1], *net.grid)


def check_forward(oracle: Oracle, kind: str) -> Checks:
    """Compare our network with one public SiT, at its output and inside."""
    checks = Checks(oracle)
    state = CONVERTERS[kind](oracle.under("state_dict/"))
    net = build(state, num_heads=oracle.number("cfg/num_heads"))
    _check_settings(checks, net)
    checks.close("state_dict/pos_embed", lambda: own_table(net), note="our table against the file's")

    x, t, y = oracle["x"], oracle["t"], oracle["y"]
    r = _end_of_jump(oracle, kind)
    inside, u = _run(net, x, t=t, r=r, y=y)
    note = "in its own time direction" if kind.startswith("willisma") else ""
    checks.close("u", u, note=note)
    math_net = build(state, num_heads=oracle.number("cfg/num_heads"), attention="math")
    checks.close("u", lambda: _run(math_net, x, t=t, r=r, y=y)[1], name="u (attention: math)")
    for key, value in inside.items():
        checks.close(f"mid/{key}", value)

    if kind in ("haoyi", "zhuyu") or "u_f64" in oracle:
        exact = build(state, num_heads=oracle.number("cfg/num_heads")).double()
        r64 = _end_of_jump(oracle, kind, torch.float64)
        checks.close("u_f64", lambda: _run(exact, x.double(), t=t.double(), r=r64, y=y)[1])
    _check_import(checks, kind)
    other = build({**state, "pos_embed": oracle["pos_embed_random"]}, num_heads=oracle.number("cfg/num_heads"))
    checks.close("u_pos_embed_random", lambda: _run(other, x, t=t, r=r, y=y)[1])
    return checks


def _check_import(checks: Checks, kind: str) -> None:
    """Compare the network that the import command makes of the file's own layout; its time runs as ours."""
    oracle, theirs = checks.oracle, checks.oracle.under("state_dict/")
    t, r, sign, note = oracle["t"], _end_of_jump(oracle, kind), 1, ""
    if kind.startswith("willisma"):
        t, r, sign, note = 1 - t, torch.zeros_like(t), -1, "time and sign folded in: u(z, r, t) = -u_SiT(z, 1 - t) for any r"
    for name, safe in (("torch", False), ("safetensors", True)):
        if safe and kind == "willisma_nosigma":
            continue  # names alone do not tell which way its time runs

        def u(safe: bool = safe) -> Tensor:
            net = through_import(kind, theirs, oracle.number("cfg/num_heads"), safetensors=safe)
            return sign * _run(net, oracle["x"], t=t, r=r, y=oracle["y"])[1]

        checks.close("u", u, name=f"u (imported, {name})", note=note)
    if kind == "willisma_nosigma":

        def as_repa() -> Tensor:
            net = through_import("repa", theirs, oracle.number("cfg/num_heads"))
            return _run(net, oracle["x"], t=oracle["t"], r=r, y=oracle["y"])[1]

        checks.close("u", as_repa, name="u (imported as REPA's)", note="time as it is, projectors dropped")


def _end_of_jump(oracle: Oracle, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return r as the file gives it: stored, through h = t - r, or r = t where the network knows one time only."""
    t = oracle["t"].to(dtype)
    if kind == "haoyi":
        return t - oracle["h"].to(dtype)
    return oracle["r"].to(dtype) if kind == "zhuyu" else t


def _check_settings(checks: Checks, net: SiT) -> None:
    """Compare the sizes that the shapes give with those that the file states."""
    channels, side, _ = net.config["latent_shape"]
    sizes = {"input_size": side, "in_channels": channels, "B": len(checks.oracle["x"])}
    sizes |= {key: net.config[key] for key in ("patch_size", "hidden_size", "depth", "num_classes")}
    for key, value in sizes.items():
        checks.same(f"cfg/{key}", value)


@torch.no_grad()
def _run(net: SiT, x: Tensor, *, t: Tensor, r: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return what happens inside, by the files' names, and the output."""
    inside: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: inside.__setitem__(name, output.x if isinstance(output, Dual) else output)

    hooks = [net.x_embedder.register_forward_hook(keep("patch_tokens"))]
    hooks += [block.register_forward_hook(keep(f"block{i}_out")) for i, block in enumerate(net.blocks)]
    hooks += [net.blocks[0].register_forward_pre_hook(lambda module, inputs: inside.__setitem__("c", inputs[1].x))]
    u = net(x, t=t, r=r, y=y)
    for hook in hooks:
        hook.remove()
    return inside, u
