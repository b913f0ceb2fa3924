"""Memory of batches, used again: fresh pages cost as much as the copy into them."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

KEPT = 8
"""Free buffers that a pool keeps at most."""
LARGEST = 1 << 26
"""Bytes of the largest buffer that is kept; larger ones go back to the system."""


class Buffers:
    """Tensors on the CPU, in memory that comes back when the last tensor and array that looks at it is gone."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=KEPT)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        """Return a tensor of any content.

        Args:
            shape: of the tensor.
            dtype: numpy's.
        """
        size = math.prod(shape) * dtype.itemsize
        memory = self._taken(size)
        array = memory[:size].view(dtype).reshape(shape)
        if memory.nbytes <= LARGEST:  # torch holds this very array, and so does every view of the tensor
            weakref.finalize(array, self._free.append, memory).atexit = False
        return torch.from_numpy(array)

    def _taken(self, size: int) -> np.ndarray:
        while self._free:
            try:
                memory = self._free.pop()
            except IndexError:  # another thread took it
                break
            if memory.nbytes >= size:
                return memory
        return np.empty(size, np.uint8)
