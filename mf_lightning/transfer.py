"""Small tensors on their way from the host to the device, without the host waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device; on a GPU from pinned memory, so that the host goes on at once."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
