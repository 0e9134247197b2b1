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
        self._kept: dict[str, Tensor] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in the memory of this name; new memory only if it does not fit."""
        size, kept = math.prod(shape), self._kept.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < size:
            # Made in inference mode, it could not be written outside of it.
            with torch.inference_mode(False):
                kept = self._kept[name] = torch.empty(size, dtype=dtype, device=self._device)
        return kept[:size].view(shape)
