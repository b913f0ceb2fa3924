"""What the figures of several processes need of each other; with one process everything is as it was."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _device() -> torch.device:
    """Return where tensors must lie to travel."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in distributed.get_backend() else torch.device("cpu")


def summed(value: Tensor) -> Tensor:
    """Return the sum over processes, on the CPU; every process calls it."""
    if world()[1] == 1:
        return value
    sent = value.detach().to(_device(), copy=True)
    distributed.all_reduce(sent)
    return sent.cpu()


def sent_from(source: int, value: Tensor) -> Tensor:
    """Return the tensor of one process, on the CPU; all give tensors of its shape and dtype, and every process calls it."""
    if world()[1] == 1:
        return value
    sent = value.detach().to(_device(), copy=True)
    distributed.broadcast(sent, source)
    return sent.cpu()
