"""The calls of the network that one step of MeanFlow (algorithm 1) makes, plain or compiled.

Compiled graphs are made for one shape each, so that row counts that vary from step to step are padded to a few sizes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mf_lightning.flow.jvp import total_derivative
from mf_lightning.types import AverageVelocity, UserError

GRAPHS_PER_CALL = 64
"""Sizes that one compiled call may meet before torch stops with an error: training, guidance, sampling and grids together."""


def average_velocity(net: AverageVelocity, z_t: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None) -> Tensor:
    """Return ``u``, (B, C, H, W)."""
    return net(z_t, t=t, r=r, y=y)


def average_velocity_and_derivative(
    net: AverageVelocity, z_t: Tensor, v_g: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``u``, (B, C, H, W), and ``du/dt`` of the last J rows along ``(v_g, 0, 1)``, (J, C, H, W), of one pass."""
    return net(z_t, t=t, r=r, y=y, v_g=v_g)


@dataclass(frozen=True)
class Passes:
    """The three ways a step calls the network, and the sizes they are called with."""

    u: Callable[..., Tensor] = average_velocity
    u_and_dudt: Callable[..., tuple[Tensor, Tensor]] = average_velocity_and_derivative
    dudt: Callable[..., Tensor] = total_derivative
    fixed_sizes: bool = False
    """Whether row counts are padded."""
    least_rows: int = 0
    """Rows that every call has at least: 1 where all processes must call a sharded network equally often."""

    @classmethod
    def compiled(cls, device: torch.device) -> Passes:
        """Return the passes under ``torch.compile``: whole graphs without breaks, one for each size.

        Raises:
            UserError: this machine cannot compile.
        """
        prepare_compiler(device)

        def whole(call):
            return torch.compile(call, fullgraph=True, dynamic=False)

        calls = (average_velocity, average_velocity_and_derivative, total_derivative)
        return cls(*map(whole, calls), fixed_sizes=True)

    def padded(self, count: int, batch_size: int, parts: int) -> int:
        """Return ``count``, or ``least_rows``, rounded up to a multiple of ``batch_size / parts`` where sizes are fixed."""
        count = max(count, self.least_rows)
        if not self.fixed_sizes:
            return count
        step = max(1, batch_size // parts)
        return -(-count // step) * step


def compiled_generator(net: AverageVelocity, *, mode: str | None = None) -> AverageVelocity:
    """Return the network as samplers call it (algorithm 2), compiled, one graph for each batch size.

    Args:
        net: average velocity; its weights may be exchanged between calls.
        mode: torch.compile's; "reduce-overhead" captures CUDA graphs.
    """
    call = torch.compile(average_velocity, fullgraph=True, dynamic=False, mode=mode)

    def generator(z_t: Tensor, *, t: Tensor, r: Tensor, y: Tensor | None) -> Tensor:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()  # the last pass's output may now be written over
        return call(net, z_t, t=t, r=r, y=y)

    return generator


PLAIN = Passes()
"""Plain torch, exact row counts."""


def prepare_compiler(device: torch.device) -> None:
    """Check that this machine can compile, and let torch make as many graphs as there are sizes.

    Raises:
        UserError: this machine cannot compile.
    """
    check_compiler(device)
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name before torch 2.7
    setattr(config, limit, max(getattr(config, limit), GRAPHS_PER_CALL))
    config.optimize_ddp = False  # it would cut these graphs inside DDP's forward


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch cannot: on a CPU it needs a C++ compiler, on a GPU triton and a C compiler.

    Raises:
        UserError: naming what is missing.
    """
    if device.type == "cpu":
        from torch._inductor import config, exc
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            compiler = get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError):
            compiler = None
        if compiler is None or shutil.which(compiler.split()[0]) is None:
            raise UserError(
                f"Got model.compile = true without a C++ compiler (looked for {config.cpp.cxx}), expected one such as g++. "
                "Install it (Debian: apt-get install g++), name it in CXX, or set model.compile to false."
            )
        return
    from torch.utils._triton import has_triton

    if not has_triton() or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise UserError(
            f"Got model.compile = true on {device} without a working triton or without the C compiler that it needs, expected "
            "both. Install triton for a GPU that it knows and gcc, or set model.compile to false."
        )
