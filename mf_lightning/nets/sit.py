"""SiT, the transformer of MeanFlow on latents, from timm's blocks with the parameter names of the public checkpoints.

Shapes: B batch, C channels, H x W latent, p patch size, T = HW / p^2 tokens, D width.
Source: willisma/SiT 947f95b (adaLN-zero blocks) with the second time embedder of MeanFlow (arXiv 2505.13447, section 4.3).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mf_lightning.nets import dual
from mf_lightning.nets.dual import Dual
from mf_lightning.nets.embed import LabelEmbedder, TimeEmbedder, position_table
from mf_lightning.types import LatentSpec, UserError

SIZES = {  # depth, width, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
"""MeanFlow table 5 (S from the public SiT)."""

TIME_INPUTS = {"t,h": ("t", "h"), "t,r": ("t", "r"), "t,r,h": ("t", "r", "h"), "h": ("h",)}
"""Which times the network sees, h = t - r: MeanFlow table 1c; each gets an embedder of its own."""


class SiTAttention(Attention):
    """timm's self-attention on dual numbers: (B, T, D) => (B, T, D)."""

    def forward(self, x: Dual) -> Dual:
        qkv = dual.linear(self.qkv, x)
        q, k, v = (dual.same(lambda a, i=i: self._heads(a)[i], qkv) for i in range(3))
        if not isinstance(self.q_norm, nn.Identity):
            q, k = dual.layer_norm(self.q_norm, q), dual.layer_norm(self.k_norm, k)
        if self.fused_attn:
            o = F.scaled_dot_product_attention(q.x, k.x, v.x)
        else:
            o = ((q.x * self.scale) @ k.x.transpose(-2, -1)).softmax(dim=-1) @ v.x
        do = None
        if x.dx is not None:
            with torch.no_grad():
                do = dual.attention_tangent(q, k, v, self.scale)
        return dual.linear(self.proj, dual.same(lambda a: a.transpose(1, 2).flatten(2), Dual(o, do)))

    def _heads(self, qkv: Tensor) -> Tensor:
        """(B, T, 3 D) => (3, B, heads, T, d)."""
        return qkv.unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)


class SiTBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-zero): (B, T, D), (B, D) => (B, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = SiTAttention(
            hidden_size, num_heads=num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=partial(nn.LayerNorm, eps=1e-6)
        )
        self.attn.fused_attn = fused
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Dual, c: Dual) -> Dual:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _condition(self.adaLN_modulation, c, 6)
        x = dual.add_gated(x, gate_a, self.attn(dual.modulate(dual.layer_norm(self.norm1, x), shift_a, scale_a)))
        hidden = dual.modulate(dual.layer_norm(self.norm2, x), shift_m, scale_m)
        hidden = dual.linear(self.mlp.fc2, dual.gelu_tanh(dual.linear(self.mlp.fc1, hidden)))
        return dual.add_gated(x, gate_m, hidden)


class FinalLayer(nn.Module):
    """Tokens => pixels of their patches: (B, T, D), (B, D) => (B, T, p p C)."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Dual, c: Dual) -> Dual:
        shift, scale = _condition(self.adaLN_modulation, c, 2)
        return dual.linear(self.linear, dual.modulate(dual.layer_norm(self.norm_final, x), shift, scale))


def _condition(layers: nn.Sequential, c: Dual, parts: int) -> list[Dual]:
    """Return ``parts`` vectors of width D: (B, D) => (B, parts D), cut."""
    out = dual.linear(layers[-1], dual.silu(c))
    tangents = [None] * parts if out.dx is None else out.dx.chunk(parts, dim=1)
    return [Dual(x, dx) for x, dx in zip(out.x.chunk(parts, dim=1), tangents, strict=True)]


class SiT(nn.Module):
    """Average-velocity network ``u(z_t, r, t | y)``: a transformer on patches of latents.

    Args:
        latent: shape of one latent and number of classes, normally the data set's.
        patch_size: pixels of a latent's side that make one token (2, 4, 8).
        depth: number of blocks.
        hidden_size: width D, a multiple of 4 and of num_heads.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over D.
        num_classes: null takes the data set's; 0 trains without labels whatever the data set holds; any other number must
            be the data set's.
        time_inputs: times the network sees, h = t - r; "t,h" is the paper's best.
        qk_norm: normalise queries and keys, which keeps attention logits bounded in low precision.
        attention: "fused" uses scaled_dot_product_attention (its math form under a JVP), "math" plain matrix products.
        activation_checkpointing: keep only what goes in and out of each block for the backward pass and compute the rest
            again: less memory, a forward's more time. Tangents are not computed again.
    """

    own_tangents = True
    """Its call takes ``v_g`` and then gives du/dt as well, see :class:`mf_lightning.types.AverageVelocity`."""

    def __init__(
        self,
        latent: LatentSpec,
        patch_size: int = 2,
        depth: int = 12,
        hidden_size: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        time_inputs: Literal["t,h", "t,r", "t,r,h", "h"] = "t,h",
        qk_norm: bool = False,
        attention: Literal["fused", "math"] = "fused",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        channels, height, width = latent.shape
        _check_shape(latent, patch_size, hidden_size, num_heads)
        self.patch_size = patch_size
        self.num_classes = _resolve_classes(num_classes, latent)
        self.times = _look_up("time_inputs", time_inputs, TIME_INPUTS)
        fused = _look_up("attention", attention, {"fused": True, "math": False})
        self.activation_checkpointing = activation_checkpointing
        self.grid = (height // patch_size, width // patch_size)
        self.config = {
            "latent_shape": list(latent.shape),
            "num_classes": self.num_classes,
            "patch_size": patch_size,
            "depth": depth,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "time_inputs": time_inputs,
            "qk_norm": qk_norm,
        }
        """What decides the shapes and the function, as plain values; stored in every checkpoint."""

        self.x_embedder = PatchEmbed((height, width), patch_size, channels, hidden_size, bias=True)
        for time in self.times:
            self.add_module(f"{time}_embedder", TimeEmbedder(hidden_size))
        self.y_embedder = LabelEmbedder(self.num_classes, hidden_size) if self.num_classes else None
        self.register_buffer("pos_embed", torch.empty(1, self.grid[0] * self.grid[1], hidden_size))
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, fused) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * channels)
        self.initialize_weights()

    @classmethod
    def of_size(cls, size: str, latent: LatentSpec, **kwargs) -> SiT:
        """Return a network of the papers' size S, B, M, L or XL, for example ``SiT.of_size("B", latent, patch_size=4)``."""
        depth, hidden_size, num_heads = _look_up("size", size, SIZES)
        return cls(latent, depth=depth, hidden_size=hidden_size, num_heads=num_heads, **kwargs)

    @property
    def y_null(self) -> int | None:
        """The null label, ``num_classes``; None for an unconditional network."""
        return self.num_classes or None

    def initialize_weights(self) -> None:
        """Initialise as the original: Xavier for linear layers, 0.02 for embeddings, zero where adaLN-zero asks for it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.data.flatten(1))
        nn.init.zeros_(patches.bias)
        with torch.no_grad():
            self.pos_embed.copy_(position_table(self.pos_embed.shape[-1], *self.grid))
        for time in self.times:
            embedder = self.get_submodule(f"{time}_embedder")
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in [*(block.adaLN_modulation[-1] for block in self.blocks), self.final_layer.adaLN_modulation[-1]]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(
        self, z_t: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None, v_g: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return ``u``, and with ``v_g`` also ``du/dt`` of the last rows, from the same pass.

        Args:
            z_t: states, (B, C, H, W).
            t: noisier end of the jump, (B,).
            r: other end, (B,).
            y: labels, (B,) int64; None if unconditional.
            v_g: velocity of the LAST J rows, (J, C, H, W): their tangent is (dz, dr, dt) = (v_g, 0, 1).

        Returns:
            ``u``, (B, C, H, W); with ``v_g`` the pair of ``u`` and ``du/dt``, (J, C, H, W), detached.
        """
        x = self._embed_patches(z_t, v_g)  # (B, T, D)
        c = self.condition(t=t, r=r, y=y, rows=None if v_g is None else len(v_g))  # (B, D)
        for block in self.blocks:
            x = self._run_block(block, x, c)  # (B, T, D)
        u = dual.same(self.unpatchify, self.final_layer(x, c))  # (B, C, H, W)
        return u.x if v_g is None else tuple(u)

    def _run_block(self, block: SiTBlock, x: Dual, c: Dual) -> Dual:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, c)
        if torch.compiler.is_compiling():  # the compiler computes again only what the backward pass uses
            return checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)

        def run(x: Dual, c: Dual) -> Dual:
            return block(dual.tangents_wanted(x), dual.tangents_wanted(c))

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:  # of the first run and the second
            return nullcontext(), dual.without_tangents()

        return checkpoint(run, x, c, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _embed_patches(self, z_t: Tensor, v_g: Tensor | None) -> Dual:
        x = self.x_embedder(z_t) + self.pos_embed
        if v_g is None:
            return Dual(x)
        with torch.no_grad():
            proj = self.x_embedder.proj
            return Dual(x, F.conv2d(v_g.to(z_t.dtype), proj.weight, stride=proj.stride).flatten(2).transpose(1, 2))

    def condition(self, *, t: Tensor, r: Tensor, y: Tensor | None, rows: int | None = None) -> Dual:
        """Return the sum of time and label embeddings; in the last ``rows`` rows dt = dh = 1, dr = 0: (B,) => (B, D)."""
        c, dc = 0, None if rows is None else 0
        for time, value in (("t", t), ("r", r), ("h", t - r)):
            if time in self.times:
                moves = rows is not None and time != "r"
                embedded = self.get_submodule(f"{time}_embedder")(value, rows if moves else None)
                c = c + embedded.x
                dc = dc + embedded.dx if moves else dc
        return Dual(c if self.y_embedder is None else c + self._embed_labels(y), dc)

    def _embed_labels(self, y: Tensor | None) -> Tensor:
        if y is None:
            raise UserError(
                f"Got no labels, expected (B,) int64 in [0, {self.num_classes}]: {self.num_classes} is the null label."
            )
        return self.y_embedder(y)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Put patches back in place: (B, T, p p C) => (B, C, H, W)."""
        rows, columns = self.grid
        p = self.patch_size
        x = tokens.reshape(len(tokens), rows, columns, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(tokens), -1, rows * p, columns * p)


def _look_up(name: str, key: str, table: dict):
    if key not in table:
        raise UserError(f"Got {name} = {key!r}, expected one of {', '.join(map(repr, table))}.")
    return table[key]


def _check_shape(latent: LatentSpec, patch_size: int, hidden_size: int, num_heads: int) -> None:
    _, height, width = latent.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise UserError(
            f"Got patch_size = {patch_size} for latents of shape {latent.shape}, expected a divisor of height and width."
        )
    if hidden_size % num_heads or hidden_size % 4:
        raise UserError(
            f"Got hidden_size = {hidden_size} with num_heads = {num_heads}, expected a multiple of num_heads and of 4."
        )


def _resolve_classes(num_classes: int | None, latent: LatentSpec) -> int:
    if num_classes is None:
        return latent.num_classes
    if num_classes not in (0, latent.num_classes):
        raise UserError(
            f"Got num_classes = {num_classes} for the network, expected the data set's {latent.num_classes}, or 0 for "
            "training without labels. Leave it out to take the data set's."
        )
    return num_classes
