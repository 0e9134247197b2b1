"""What depth attention attended to, summed up over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Record"]


class Record:
    """Depth-attention weights per site, summed up over all tokens of all forwards recorded."""

    def __init__(self) -> None:
        self._weights: dict[int, Tensor] = {}
        self._entropies: dict[int, Tensor] = {}
        self._tops: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def add(self, site: int, weights: Tensor) -> None:
        """Adds the weights ``[N, ...]`` of one read."""
        tokens = weights[0].numel()
        weights = weights.detach().reshape(weights.shape[0], tokens)
        # No bincount: it has the host wait for the device.
        largest = weights.argmax(0)
        top = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
        top.scatter_add_(0, largest, torch.ones_like(largest))
        # 0 log 0 is 0.
        entropy = torch.special.entr(weights).sum(dtype=torch.float64)
        for sums, value in (
            (self._weights, weights.sum(1, dtype=torch.float64)),
            (self._entropies, entropy),
            (self._tops, top),
        ):
            sums[site] = sums[site] + value if site in sums else value
        self._tokens[site] = self._tokens.get(site, 0) + tokens

    @property
    def weights(self) -> dict[int, Tensor]:
        """Site -> ``[N]``, the mean weights: float32 on the CPU, summing to 1;
        ``AttentionResiduals.sources_at`` names the entries."""
        return self._means(self._weights)

    @property
    def top_shares(self) -> dict[int, Tensor]:
        """Site -> ``[N]``: which share of tokens gives each source the largest weight."""
        return self._means(self._tops)

    @property
    def entropies(self) -> dict[int, float]:
        """Site -> mean entropy of a token's weights in nats, between 0 and ln N.

        At most the entropy of the mean weights, which is larger where tokens differ.
        """
        return {site: mean.item() for site, mean in self._means(self._entropies).items()}

    def _means(self, sums: dict[int, Tensor]) -> dict[int, Tensor]:
        return {
            site: (total.double() / max(self._tokens[site], 1)).float().cpu()
            for site, total in sorted(sums.items())
        }
