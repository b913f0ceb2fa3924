"""SiT, the transformer of MeanFlow on latents, from timm's blocks with the parameter names of the public checkpoints.

Shapes: B batch, C channels, H x W latent, p patch size, T = HW / p^2 tokens, D width.
Source: willisma/SiT 947f95b (adaLN-zero blocks) with the second time embedder of MeanFlow (arXiv 2505.13447, section 4.3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mf_lightning.nets import dual, kernels
from mf_lightning.nets.blocks import FinalLayer, SiTBlock
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
        attention: "fused" computes values by scaled_dot_product_attention, "math" by plain matrix products.
        jvp_attention: attention under the tangents: "math" plain matrix products, "flash" the kernel of the package
            jvp-flash-attention (extra ``kernels``, GPU only).
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
        jvp_attention: Literal["math", "flash"] = "math",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.init_seed = int(torch.randint(2**63 - 1, (), device="cpu"))  # from torch's own seed, before any layer draws
        channels, height, width = latent.shape
        _check_shape(latent, patch_size, hidden_size, num_heads)
        self.patch_size = patch_size
        self.num_classes = _resolve_classes(num_classes, latent)
        self.times = _look_up("time_inputs", time_inputs, TIME_INPUTS)
        fused = _look_up("attention", attention, {"fused": True, "math": False})
        self.activation_checkpointing = activation_checkpointing
        self.grid = (height // patch_size, width // patch_size)
        self.jvp_attention = jvp_attention
        if _look_up("jvp_attention", jvp_attention, {"flash": True, "math": False}):
            kernels.check_shapes(self.grid[0] * self.grid[1], hidden_size // num_heads)
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
        for block in self.blocks:
            block.attn.flash_tangents = jvp_attention == "flash"
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * channels)
        if not self.pos_embed.is_meta:  # one without memory gets its values in shards
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

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """Try on a device what may not run there: the fused kernel under the tangents, against math attention.

        Args:
            device: where the network will run.
            dtype: of its activations.

        Raises:
            UserError: the kernel does not run there, or is wrong there.
        """
        if self.jvp_attention == "flash":
            attention = self.blocks[0].attn
            shape = {"tokens": self.pos_embed.shape[1], "num_heads": attention.num_heads, "head_size": attention.head_dim}
            kernels.check_kernel(device, **shape, dtype=dtype)

    def initial_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and first value of each parameter and buffer, one whole tensor at a time, on the CPU.

        Each is a function of (``init_seed``, name): a network that is built in shards starts where one built whole does.
        """
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            key = hashlib.sha256(f"{self.init_seed} {name}".encode()).digest()
            _initialize(name, value, torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little", signed=True)))
            yield name, value
        yield "pos_embed", position_table(self.pos_embed.shape[-1], *self.grid)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise as the original: Xavier for linear layers, 0.02 for embeddings, zero where adaLN-zero asks for it."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, value in self.initial_weights():
            tensors[name].copy_(value)

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

        tangents = [(x.dx, c.dx)]

        def run(
            x: Tensor, c: Tensor
        ) -> Dual:  # the first run takes the tangents, the second, for the backward pass, finds none
            dx, dc = tangents.pop() if tangents else (None, None)
            return block(Dual(x, dx), Dual(c, dc))

        return checkpoint(run, x.x, c.x, use_reentrant=False, preserve_rng_state=False)

    def _embed_patches(self, z_t: Tensor, v_g: Tensor | None) -> Dual:
        x = self.x_embedder(z_t) + self.pos_embed
        if v_g is None:
            return Dual(x)
        with torch.no_grad():
            proj = self.x_embedder.proj
            tokens = F.conv2d(v_g.to(z_t.dtype), proj.weight, stride=proj.stride).flatten(2).transpose(1, 2)
            return Dual(x, tokens.to(x.dtype))  # under autocast the residual stream is float32, and its tangent with it

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
        p, count = self.patch_size, tokens.shape[0]  # len() would fix the batch of an exported graph
        x = tokens.reshape(count, rows, columns, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(count, -1, rows * p, columns * p)


def _initialize(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Fill the first value of a SiT's parameter, by its name."""
    zero = ("bias", "adaLN_modulation.1.weight", "final_layer.linear.weight")
    if name.endswith(zero):
        value.zero_()
    elif "_norm." in name:
        value.fill_(1)
    elif "_embedder.mlp." in name or "embedding_table" in name:
        value.normal_(std=0.02, generator=generator)
    else:
        nn.init.xavier_uniform_(value.flatten(1), generator=generator)


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
