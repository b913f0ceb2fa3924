"""The fused attention kernel of the package jvp-flash-attention (amorehead/jvp-flash-attention 0.14.0) under the tangents.

It computes ``softmax(scale q k^T) v`` and its tangent together without storing the T x T matrices, forward only.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from mf_lightning.nets.dual import Dual, attention_tangent
from mf_lightning.types import UserError

KEY = "model.net.init_args.jvp_attention"
HEAD_SIZES = (32, 64, 128, 256)
TOKEN_STEP = 32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BOUND = 0.02
"""Largest difference to math attention at start-up over the largest tangent; in bfloat16 one rounding is 0.004."""


def check_shapes(tokens: int, head_size: int) -> None:
    """Refuse what the kernel cannot do, before anything is built.

    Raises:
        UserError: a head larger than 256, a number of tokens that is no multiple of 32, or the package is missing.
    """
    if head_size > HEAD_SIZES[-1]:
        raise UserError(
            f"Got {KEY} = flash with heads of size {head_size}, expected at most {HEAD_SIZES[-1]}. Use more heads, or math."
        )
    if tokens % TOKEN_STEP:
        raise UserError(
            f"Got {KEY} = flash with {tokens} tokens, expected a multiple of {TOKEN_STEP}. Change the patch size, or use math."
        )
    _forward()


def check_kernel(device: torch.device, *, tokens: int, num_heads: int, head_size: int, dtype: torch.dtype) -> float:
    """Run the kernel once beside math attention and return the largest relative difference of the tangents.

    Raises:
        UserError: it does not run on this device, or differs.
    """
    q, k, v = (
        Dual(*torch.randn(2, 2, num_heads, tokens, head_size, generator=torch.Generator().manual_seed(i)).to(device, dtype))
        for i in range(3)
    )
    exact = attention_tangent(*(Dual(d.x.float(), d.dx.float()) for d in (q, k, v)), head_size**-0.5)
    try:
        flash = flash_attention_tangent(q, k, v, head_size**-0.5).float()
    except UserError:
        raise
    except Exception as error:  # whatever triton raises where it cannot compile for this device
        raise UserError(
            f"Got {KEY} = flash, whose kernel does not run on {device} with this triton ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]}), expected a GPU and a triton that it was written for. Use math."
        ) from error
    difference = float((flash - exact).abs().max() / exact.abs().max())
    if not difference <= BOUND:
        raise UserError(
            f"Got {KEY} = flash, whose tangents differ from math attention's by {difference:.2g} of the largest in {dtype}, "
            f"expected at most {BOUND}: the kernel is wrong here, and wrong tangents train silently. Use math."
        )
    return difference


def flash_attention_tangent(q: Dual, k: Dual, v: Dual, scale: float) -> Tensor:
    """Return the tangent of ``softmax(scale q k^T) v``, (J, heads, T, d), from the fused kernel.

    Heads of other sizes than 32, 64, 128 and 256 are filled up with zeros, which change neither products nor ``scale``: exact.

    Raises:
        UserError: the device is no GPU, or a dtype that the kernel does not know.
    """
    size, dtype = q.x.shape[-1], v.x.dtype  # normalised queries may be float32 under autocast
    if dtype not in DTYPES:
        raise UserError(f"Got {KEY} = flash in {dtype}, expected float16, bfloat16 or float32. Use math.")
    fill = next(known for known in HEAD_SIZES if known >= size) - size
    operands = [value.to(dtype) for value in (q.rows, k.rows, v.rows, q.dx, k.dx, v.dx)]
    operands = [F.pad(value, (0, fill)).contiguous() for value in operands]
    return _kernel(*operands, scale)[..., :size]


@torch.library.custom_op("mf_lightning::flash_attention_tangent", mutates_args=())
def _kernel(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float) -> Tensor:
    """One node for the compiler, so that it never looks inside."""
    if q.device.type != "cuda" and not _interpreted():
        raise UserError(f"Got {KEY} = flash on {q.device}, expected an Nvidia or AMD GPU: the kernel is triton's. Use math.")
    _, context = _forward()(q, k, v, dq, dk, dv, None, 0.0, False, scale)
    return context[0]


@_kernel.register_fake
def _(q, k, v, dq, dk, dv, scale):
    return torch.empty_like(q)


def _interpreted() -> bool:
    """Whether triton interprets its kernels on the CPU, as tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _forward():
    """Return the kernel's forward function.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except ImportError as error:
        raise UserError(
            f"Got {KEY} = flash without the package jvp-flash-attention ({error}), expected it: "
            "pip install 'mf_lightning[kernels]'. Or use math."
        ) from error
    return JVPAttn.forward
