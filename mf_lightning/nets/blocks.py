"""The transformer block of SiT, in dual numbers, from timm's attention and MLP with the parameter names of the public code.

Shapes: B batch, T tokens, D width, d = D / heads.
Source: willisma/SiT 947f95b (adaLN-zero).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from mf_lightning.nets import dual, kernels
from mf_lightning.nets.dual import Dual


class SiTAttention(Attention):
    """timm's self-attention on dual numbers: (B, T, D) => (B, T, D)."""

    flash_tangents = False

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
                tangent = kernels.flash_attention_tangent if self.flash_tangents else dual.attention_tangent
                do = tangent(q, k, v, self.scale)
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
