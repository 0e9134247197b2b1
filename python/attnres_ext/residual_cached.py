"""The state of a forward pass for inference: blocks live in a cache and are changed in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from attnres_ext.cache import BlockCache
from attnres_ext.residual_state import Reading, ResidualState
from attnres_ext.suspended import SuspendedPass

if TYPE_CHECKING:
    from attnres_ext.residual import AttentionResiduals

__all__ = ["CachedState"]


class CachedState(ResidualState):
    """Inference: the block cache holds blocks and the open sum, and is changed in place."""

    def __init__(
        self, residual: AttentionResiduals, cache: BlockCache, embedding: Tensor | None = None
    ) -> None:
        super().__init__(residual, embedding)
        call = "resume" if embedding is None else "start"
        if cache.capacity < residual.num_blocks + 1:
            raise ValueError(
                f"{call}: cache has {cache.capacity} slots, "
                f"expected at least {residual.num_blocks + 1} "
                f"({residual.num_blocks} blocks and the embedding)"
            )
        if cache.eps != residual.eps:
            raise ValueError(
                f"{call}: cache was made for eps {cache.eps}, expected the module's {residual.eps}"
            )
        if embedding is not None:
            cache.check_fits("embedding", embedding)
            cache.reset()
        self._cache, self._generation = cache, cache.generation
        # The block whose sites' phase 1 the cache holds, if any.
        self._phase1_block: int | None = None
        self._vectors: Tensor | None = None
        self._out: Tensor | None = None

    def read(
        self,
        site: int,
        norm_weight: Tensor | None = None,
        norm_eps: float | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`ResidualState.read`, into ``out`` if it is given: then nothing is allocated.

        Otherwise the result is a tensor of its own, unless the cache has one for all reads
        (``reuse_result``), which the next read overwrites. ``out`` has the cache's shape and dtype,
        and is not what is written next.
        """
        self._out = out
        return super().read(site, norm_weight, norm_eps)

    def read_output(
        self,
        norm_weight: Tensor | None = None,
        norm_eps: float | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`ResidualState.read_output`, with ``out`` as for :meth:`read`."""
        self._out = out
        return super().read_output(norm_weight, norm_eps)

    def _read(self, site: int, delta: Tensor, reading: Reading) -> Tensor:
        residual, cache = self._residual, self._cache
        self._check_cache("read", site)
        block = cache.num_sealed
        if self._phase1_block == block:
            index = site - self._sites_read_together(block)[0]
            hidden = cache.merge(index, delta, **reading, out=self._out)
        else:
            hidden = cache.attend(delta, **reading, out=self._out)
        if residual._record is not None:
            self._record(site, cache.sources(), reading)
        if residual.closes_block(site):
            cache.close()
            if site + 1 < residual.sites.stop:
                self._begin_block(delta)
        return hidden

    def _check_cache(self, call: str, site: int) -> None:
        if self._cache.generation != self._generation:
            raise RuntimeError(
                f"{call}: before site {site} was read, another forward pass was started on "
                "the same cache; forwards at the same time need a cache each"
            )

    def _suspend(self) -> SuspendedPass:
        """What is finished or open are views of the cache, until another pass begins on it."""
        self._check_cache("suspend", self._site)
        cache = self._cache
        sources, count = cache.sources(), cache.num_sealed
        partial = sources[count] if cache.open_holds_partial else None
        return SuspendedPass(self._site, tuple(sources[:count]), partial, self._pending)

    def _go_on(self, suspended: SuspendedPass) -> None:
        super()._go_on(suspended)
        cache = self._cache
        for tensor in suspended.tensors:
            cache.check_fits("what is resumed", tensor)
        cache.reset()
        self._generation = cache.generation
        for index, source in enumerate((*suspended.blocks, suspended.partial)):
            if source is None:
                continue
            # Of this very cache: what is added to memory must not be that memory.
            cache.write(source.clone() if cache.holds(source) else source)
            if index < len(suspended.blocks):
                cache.close()
        if suspended.blocks:
            self._begin_block(suspended.blocks[0])

    def _begin_block(self, delta: Tensor) -> None:
        """Attends over the finished blocks for all sites of the next one, where that pays.

        That needs nothing of the sublayer that comes before its first site: a cache with a side
        stream does it meanwhile.
        """
        residual, cache = self._residual, self._cache
        block = cache.num_sealed
        if not residual.reads_in_two_phases(block, delta, training=False):
            return
        if self._vectors is None:
            self._vectors = cache.stacked(
                [
                    [vectors[site] for site in residual.sites]
                    for vectors in (residual.queries, residual.key_weights)
                ]
            )
        sites, first = self._sites_read_together(block), residual.sites.start
        cache.inter(*self._vectors[:, sites.start - first : sites.stop - first])
        self._phase1_block = block
