"""State dicts of public torch SiTs => state dicts of :class:`mf_lightning.nets.SiT`; tensors in, tensors out.

Sources: HaoyiZhu/MeanFlow-PyTorch cf7cd11, zhuyu-cs/MeanFlow 04d183c, willisma/SiT 947f95b. Load the result strictly: a
name that these functions do not know stays as it is and is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, zeros_like

from mf_lightning.types import UserError


def from_haoyi(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return HaoyiZhu's parameters: the names are ours."""
    return dict(state)


def from_zhuyu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zhuyu-cs' parameters: its ``r_embedder`` is given t - r, so it is our ``h_embedder``."""
    _expect(state, "r_embedder.mlp.0.weight", "zhuyu-cs/MeanFlow")
    return {_renamed(name, "r_embedder.", "h_embedder."): value for name, value in state.items()}


def from_willisma(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of willisma's plain flow-matching SiT, with an ``h_embedder`` of zeros.

    The network then gives the same output whatever r is. Its time runs the OTHER way (t = 0 is noise, and it returns
    data - noise): call it with that t, or start a training from it knowing so. Learned variances are cut off.
    """
    _expect(state, "t_embedder.mlp.0.weight", "willisma/SiT")
    if "h_embedder.mlp.0.weight" in state:
        raise UserError(
            "Got a state dict with h_embedder, expected one of willisma/SiT, which has none. It has our names already: "
            "use from_haoyi."
        )
    of_t = {name: value for name, value in state.items() if name.startswith("t_embedder.")}
    of_h = {_renamed(name, "t_embedder.", "h_embedder."): zeros_like(value) for name, value in of_t.items()}
    return without_learned_sigma({**state, **of_h})


def without_learned_sigma(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with a last layer of C channels per pixel; one of 2C (learn_sigma) keeps its first C.

    Rows of that layer are ordered (p, p, channels), so the halves lie within each pixel, not one after the other.
    """
    weight, bias = (_expect(state, f"final_layer.linear.{kind}", "a SiT") for kind in ("weight", "bias"))
    channels, patch_size = _expect(state, "x_embedder.proj.weight", "a SiT").shape[1:3]
    pixels = patch_size**2
    if len(weight) == pixels * channels:
        return dict(state)
    if len(weight) != 2 * pixels * channels:
        raise UserError(
            f"Got a last layer of {len(weight)} rows, expected {pixels * channels} (p p C), or {2 * pixels * channels} "
            f"with learned variances, for patches of {patch_size} x {patch_size} with {channels} channels. Check that "
            "the file holds one network's parameters."
        )
    kept = {
        "final_layer.linear.weight": weight.reshape(pixels, 2 * channels, -1)[:, :channels].flatten(0, 1),
        "final_layer.linear.bias": bias.reshape(pixels, 2 * channels)[:, :channels].flatten(),
    }
    return {**state, **kept}


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _expect(state: Mapping[str, Tensor], name: str, source: str) -> Tensor:
    if name not in state:
        raise UserError(
            f"Got a state dict without '{name}' ({len(state)} arrays), expected the parameters of {source}. Check "
            "which repository the file is from, and that it is the model's own state dict."
        )
    return state[name]
