"""Memory that is made once and used again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Scratch"]


class Scratch:
    """Tensors by name, made when they are first asked for and kept for as much or less.

    What a tensor held is lost when it is asked for again in another shape.

    Args:
        device: Where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[str, Tensor] = {}
        self._given: dict[str, Tensor] = {}  # what each name was given last

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in the memory of this name; new memory only if it does not fit."""
        given = self._given.get(name)
        if given is not None and given.shape == shape and given.dtype == dtype:
            return given
        size, memory = math.prod(shape), self._memory.get(name)
        # Made in inference mode, it could not be written outside of it.
        with torch.inference_mode(False):
            if memory is None or memory.dtype != dtype or memory.numel() < size:
                memory = torch.empty(size, dtype=dtype, device=self._device)
                self._memory[name] = memory
            given = self._given[name] = memory[:size].view(shape)
        return given
