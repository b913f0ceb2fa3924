"""State dicts of public torch SiTs => state dicts of :class:`mf_lightning.nets.SiT`; tensors in, tensors out.

Sources: HaoyiZhu/MeanFlow-PyTorch cf7cd11, zhuyu-cs/MeanFlow 04d183c, willisma/SiT 947f95b, sihyun-yu/REPA 2b8c181.
Load the result strictly: a name that these functions do not know stays as it is and is refused there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, arange, cat, exp, float32, zeros_like
from torch.nn.functional import silu

from mf_lightning.types import UserError


def from_haoyi(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return HaoyiZhu's parameters: the names are ours."""
    return dict(state)


def from_zhuyu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zhuyu-cs' parameters: its ``r_embedder`` is given t - r, so it is our ``h_embedder``."""
    _expect(state, "r_embedder.mlp.0.weight", "zhuyu-cs/MeanFlow")
    return {_renamed(name, "r_embedder.", "h_embedder."): value for name, value in state.items()}


def from_willisma(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of willisma's plain flow-matching SiT, with an ``h_embedder`` that gives 0.

    The network then gives the same output whatever r is. Its time runs the OTHER way (t = 0 is noise, and it returns
    data - noise): see :func:`reverse_time`. Learned variances are cut off.
    """
    _expect(state, "t_embedder.mlp.0.weight", "willisma/SiT")
    if "h_embedder.mlp.0.weight" in state:
        raise UserError(
            "Got a state dict with h_embedder, expected one of willisma/SiT, which has none. It has our names already: "
            "use from_haoyi."
        )
    return with_silent_h(without_learned_sigma(state))


def with_silent_h(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a flow-matching network's parameters with an ``h_embedder`` that says the same whatever h is.

    Its last weight is 0, its first layer is that of ``t``: with both at 0 no gradient would ever pass. Where there is an
    ``h_embedder`` (of a network that was trained on h = 0 alone), what it says at h = 0 becomes its bias.
    """
    t_path = _embedder(state, "t")
    silent = dict(state) | {f"h_embedder.{name}": value.clone() for name, value in t_path.items()}
    silent["h_embedder.mlp.2.weight"] = zeros_like(t_path["mlp.2.weight"])
    silent["h_embedder.mlp.2.bias"] = zeros_like(t_path["mlp.2.bias"])
    if any(name.startswith("h_embedder.") for name in state):
        h_path = {name: value.double() for name, value in _embedder(state, "h").items()}
        weight = h_path["mlp.0.weight"]
        at_zero = silu(weight[:, : weight.shape[1] // 2].sum(dim=1) + h_path["mlp.0.bias"])  # cos 0 = 1, sin 0 = 0
        bias = h_path["mlp.2.weight"] @ at_zero + h_path["mlp.2.bias"]
        silent["h_embedder.mlp.2.bias"] = bias.to(t_path["mlp.2.bias"].dtype)
    return silent


def _embedder(state: Mapping[str, Tensor], time: str) -> dict[str, Tensor]:
    """Return the four tensors of a time's embedder by their names within it, once their shapes fit each other."""
    names = ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")
    dimensions = dict(zip(names, (2, 1, 2, 1), strict=True))
    found = {name: _expect(state, f"{time}_embedder.{name}", "a SiT", count) for name, count in dimensions.items()}
    width, features = found["mlp.0.weight"].shape
    fitting = dict(zip(names, ((width, features), (width,), (width, width), (width,)), strict=True))
    wrong = [f"{time}_embedder.{name} {tuple(found[name].shape)}" for name in names if found[name].shape != fitting[name]]
    if wrong or features % 2:
        raise UserError(
            f"Got {', '.join(wrong) or 'an odd number of features'} behind a first layer of shape {(width, features)}, "
            "expected the shapes of one time embedder. Check that the file holds one network's parameters."
        )
    return found


def reverse_time(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of ``u(z, t) = -u_SiT(z, 1 - t)``: from data at t = 1 to data at t = 0, exactly.

    The features of 1 - t are rotations of those of t: cos w(1-t) = cos w cos wt + sin w sin wt and sin w(1-t) = sin w cos wt
    - cos w sin wt. So the first layer takes the rotation (computed in float64), the last one the sign.
    """
    first = _embedder(state, "t")["mlp.0.weight"]
    half = first.shape[1] // 2
    frequency = exp(-math.log(10_000) * arange(half, dtype=float32) / half).double()  # in float32, as both networks have them
    of_cos, of_sin = first.double().split(half, dim=1)
    cos, sin = frequency.cos(), frequency.sin()
    turned = cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    last = {name: -_expect(state, name, "a SiT") for name in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return {**state, **last, "t_embedder.mlp.0.weight": turned.to(first.dtype)}


def from_repa(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return REPA's parameters without projectors, with a silent ``h_embedder``; its time and velocity run as ours.

    Its older files count the blocks behind the projectors apart, as ``decoder_blocks``.
    """
    kept = {name: value for name, value in state.items() if not name.startswith("projectors.")}
    first = len({name.split(".")[1] for name in kept if name.startswith("blocks.")})
    renamed = {}
    for name, value in kept.items():
        if (behind := re.fullmatch(r"decoder_blocks\.(\d+)\.(.+)", name)) is not None:
            name = f"blocks.{int(behind[1]) + first}.{behind[2]}"
        renamed[name] = value
    return with_silent_h(renamed)


def without_learned_sigma(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with a last layer of C channels per pixel; one of 2C (learn_sigma) keeps its first C.

    Rows of that layer are ordered (p, p, channels), so the halves lie within each pixel, not one after the other.
    """
    weight = _expect(state, "final_layer.linear.weight", "a SiT", 2)
    bias = _expect(state, "final_layer.linear.bias", "a SiT", 1)
    channels, patch_size = _expect(state, "x_embedder.proj.weight", "a SiT", 4).shape[1:3]
    pixels = patch_size**2
    if len(weight) == pixels * channels:
        return dict(state)
    if len(weight) != 2 * pixels * channels or len(bias) != len(weight):
        raise UserError(
            f"Got a last layer of {len(weight)} rows, expected {pixels * channels} (p p C), or {2 * pixels * channels} "
            f"with learned variances, for patches of {patch_size} x {patch_size} with {channels} "
            f"channels, and as many biases, here {len(bias)}. Check that the file holds one network's parameters."
        )
    kept = {
        "final_layer.linear.weight": weight.reshape(pixels, 2 * channels, -1)[:, :channels].flatten(0, 1),
        "final_layer.linear.bias": bias.reshape(pixels, 2 * channels)[:, :channels].flatten(),
    }
    return {**state, **kept}


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _expect(state: Mapping[str, Tensor], name: str, source: str, dimensions: int | None = None) -> Tensor:
    if name not in state or dimensions not in (None, state[name].dim()):
        got = f"without '{name}'" if name not in state else f"whose '{name}' has the shape {tuple(state[name].shape)}"
        shape = "" if dimensions is None else f", with {dimensions} dimensions"
        raise UserError(
            f"Got a state dict {got} ({len(state)} arrays), expected the parameters of {source}{shape}. Check which repository "
            "the file is from, and that it is the model's own state dict."
        )
    return state[name]
