"""The weights' update as one compiled graph: optimizer step and moving average, many small operations each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mf_lightning.sharding import local
from mf_lightning.types import UserError


def compile_step(optimizer: Optimizer) -> None:
    """Replace ``optimizer.step`` by a compiled one, in place; call it before a learning-rate schedule is made.

    Learning rates become tensors, so that a schedule does not compile anew at each step. torch leaves fused optimizers
    (``fused: true``) out of compilation; such a step is one kernel already and stays as it is.

    Args:
        optimizer: any optimizer of torch whose step compiles without graph breaks (Adam, AdamW, SGD, ...).

    Raises:
        UserError: the optimizer keeps its learning rate from being a tensor.
    """
    if any(group.get("fused") for group in optimizer.param_groups):
        return
    if any(group.get("foreach") and not group.get("capturable") for group in optimizer.param_groups):
        raise UserError(
            "Got model.compile = true with foreach = true for the optimizer, expected foreach left out: compilation needs "
            "the learning rate as a tensor, which torch refuses there. Leave foreach out (compiled, it is fused anyway), or "
            "set fused = true."
        )
    update = torch.no_grad()(partial(inspect.unwrap(type(optimizer).step), optimizer))  # without hooks that break the graph
    compiled = torch.compile(lambda: update(), fullgraph=True, dynamic=False)

    def step(self: Optimizer, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            return loss  # a skipped step
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor):  # at the start, and again after a checkpoint was loaded
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        compiled()
        return loss

    optimizer.step = MethodType(step, optimizer)  # a method: schedules wrap it to see that it is called


def plain_states(checkpoint: dict[str, Any], optimizers: list[Optimizer]) -> None:
    """Undo in a checkpoint what compilation does to optimizers and schedules, in place: it may be loaded without.

    Args:
        checkpoint: with Lightning's ``optimizer_states`` and ``lr_schedulers``.
        optimizers: the ones whose states these are.
    """
    for state, optimizer in zip(checkpoint.get("optimizer_states", []), optimizers, strict=False):
        for group in state["param_groups"]:
            group["lr"] = _number(group["lr"])
            if "capturable" in group:  # the compiler may switch it on, and a CPU refuses it
                group["capturable"] = optimizer.defaults["capturable"]
    for state in checkpoint.get("lr_schedulers", []):
        if "_last_lr" in state:
            state["_last_lr"] = [_number(rate) for rate in state["_last_lr"]]


def _number(rate: float | Tensor) -> float:
    return rate.item() if isinstance(rate, Tensor) else rate


def clip_gradients(parameters: Iterable[Tensor], largest: float, norm: Tensor) -> None:
    """Scale gradients, in place, so that their norm is at most ``largest``; as ``torch.nn.utils.clip_grads_with_norm_`` does.

    Args:
        parameters: whole or in shards.
        largest: norm to keep.
        norm: of the gradients of all shards, a plain tensor.
    """
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, torch.clamp(largest / (norm + 1e-6), max=1.0).to(gradients[0].device))


def average(averages: list[Tensor], weights: list[Tensor], amount: float) -> None:
    """Move averages towards weights, ``w <- w + amount (theta - w)``, in place, in few kernels."""
    torch._foreach_lerp_(averages, weights, amount)


def compiled_average() -> Callable[[list[Tensor], list[Tensor], float], None]:
    """Return :func:`average` as one compiled graph for all tensors and every amount."""

    def move(averages: list[Tensor], weights: list[Tensor], amount: Tensor) -> None:
        for mean, weight in zip(averages, weights, strict=True):
            mean.lerp_(weight, amount.to(mean.dtype))

    compiled = torch.compile(move, fullgraph=True, dynamic=False)

    def call(averages: list[Tensor], weights: list[Tensor], amount: float) -> None:
        if averages:
            compiled(averages, weights, torch.full((), amount, dtype=torch.float64, device=averages[0].device))

    return call
