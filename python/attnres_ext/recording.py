"""What depth attention attended to, averaged over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Record"]


class Record:
    """Mean depth-attention weights per site, over all tokens of all forwards recorded."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def add(self, site: int, weights: Tensor) -> None:
        """Adds the weights ``[N, ...]`` of one read."""
        tokens = weights[0].numel()
        total = weights.detach().reshape(weights.shape[0], tokens).sum(1, dtype=torch.float64)
        if site in self._sums:
            total = self._sums[site] + total
            tokens += self._tokens[site]
        self._sums[site], self._tokens[site] = total, tokens

    @property
    def weights(self) -> dict[int, Tensor]:
        """Site -> ``[N]``, float32 on the CPU, summing to 1; ``AttentionResiduals.sources_at``
        names the entries."""
        return {
            site: (total / max(self._tokens[site], 1)).float().cpu()
            for site, total in sorted(self._sums.items())
        }
