"""The state of a forward pass for inference: blocks live in a cache and are changed in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnres_ext.cache import BlockCache
from attnres_ext.residual_state import ResidualState

if TYPE_CHECKING:
    from attnres_ext.residual import AttentionResiduals

__all__ = ["CachedState"]


class CachedState(ResidualState):
    """Inference: the block cache holds blocks and the open sum, and is changed in place."""

    def __init__(self, residual: AttentionResiduals, embedding: Tensor, cache: BlockCache) -> None:
        super().__init__(residual, embedding)
        if cache.capacity < residual.num_blocks + 1:
            raise ValueError(
                f"start: cache has {cache.capacity} slots, "
                f"expected at least {residual.num_blocks + 1} "
                f"({residual.num_blocks} blocks and the embedding)"
            )
        if cache.eps != residual.eps:
            raise ValueError(
                f"start: cache was made for eps {cache.eps}, expected the module's {residual.eps}"
            )
        cache.check_fits("embedding", embedding)
        cache.reset()
        self._cache = cache
        self._phase1 = 0  # sites of the open block whose phase 1 the cache holds
        self._phase1_next = 0

    def _read(
        self, site: int, delta: Tensor, query: Tensor, key_weight: Tensor | None, norm: dict
    ) -> Tensor:
        residual, cache = self._residual, self._cache
        self._begin_block(site, delta)
        weights = {"out_weight": norm["out_weight"], "out_eps": norm["out_eps"]}
        if self._phase1:
            hidden = cache.merge(self._phase1_next, delta, query, key_weight, **weights)
            self._phase1_next += 1
        else:
            hidden = cache.attend(delta, query, key_weight, **weights)
        if residual._record is not None:
            self._record(site, cache.sources(), query, key_weight)
        if residual.closes_block(site):
            cache.close()
        return hidden

    def _begin_block(self, site: int, delta: Tensor) -> None:
        residual, cache = self._residual, self._cache
        if cache.open_holds_partial or site == 0:
            return
        self._phase1 = self._phase1_next = 0
        block = cache.num_sealed
        if not residual.reads_in_two_phases(block, delta, training=False):
            return
        sites = residual.sites_of_block(block)
        cache.inter(
            torch.stack([residual.queries[s] for s in sites]),
            torch.stack([residual.key_weights[s] for s in sites]),
        )
        self._phase1 = len(sites)
