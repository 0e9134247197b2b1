"""The state of one forward pass through Attention Residuals: finished blocks, the open sum, what
waits to be added."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnres_ext import ops
from attnres_ext.gradient_buffer import GradientBuffer, can_tap, tap

if TYPE_CHECKING:
    from attnres_ext.cache import BlockCache
    from attnres_ext.residual import AttentionResiduals

__all__ = ["CachedState", "ResidualState", "TrainingState"]


class ResidualState(ABC):
    """Sites read in order, each followed by one write.

    What is written stays pending: the next read adds it to the open block in the kernel that also
    reads. The embedding is the first thing written, and a block of its own.
    """

    def __init__(self, residual: AttentionResiduals, embedding: Tensor) -> None:
        self._residual = residual
        self._shape = embedding.shape
        self._device = embedding.device
        self._site = 0  # the next to read
        self._pending: Tensor | None = embedding

    @property
    def site(self) -> int:
        """The site to read next; ``num_sites`` once the output is read."""
        return self._site

    def write(self, x: Tensor) -> None:
        """Adds a sublayer's output ``[..., D]``, of the embedding's shape, to the open block.

        Raises:
            RuntimeError: If no read came since the last write, or the output site is read.
            ValueError: If ``x`` does not have the embedding's shape or device, or is no floating
                point tensor.
        """
        if self._site == self._residual.num_sites:
            raise RuntimeError(
                "write: the output is read, this forward pass is over; call start for another one"
            )
        if self._pending is not None:
            raise RuntimeError(
                f"write: called twice before site {self._site} was read; "
                "sites are read in turn, each followed by one write"
            )
        if x.shape != self._shape:
            raise ValueError(
                f"write: x has shape {tuple(x.shape)}, "
                f"expected {tuple(self._shape)} as the embedding"
            )
        if x.device != self._device:
            raise ValueError(f"write: x is on {x.device}, expected {self._device} as the embedding")
        if not x.is_floating_point():
            raise ValueError(f"write: x has dtype {x.dtype}, expected a floating point dtype")
        self._pending = x

    def read(
        self, site: int, norm_weight: Tensor | None = None, norm_eps: float | None = None
    ) -> Tensor:
        """The input of sublayer ``site``: the mix of everything written so far, ``[..., D]``.

        Args:
            site: The sublayer that reads; sites are read in order.
            norm_weight: Gain ``[D]`` of the sublayer's own RMSNorm, which is then fused; None
                leaves the mix as it is.
            norm_eps: Epsilon of that norm; None takes the module's.

        Raises:
            RuntimeError: If it is another site's turn, or nothing was written since the last read.
        """
        num_sublayers = self._residual.num_sublayers
        if not 0 <= site < num_sublayers:
            raise ValueError(
                f"read: site is {site}, expected 0 to {num_sublayers - 1}; "
                "read_output reads the output site"
            )
        return self._take_turn(site, norm_weight, norm_eps)

    def read_output(
        self, norm_weight: Tensor | None = None, norm_eps: float | None = None
    ) -> Tensor:
        """The model's output: the mix over all blocks, ``[..., D]``. Arguments and errors as for
        :meth:`read`."""
        return self._take_turn(self._residual.num_sublayers, norm_weight, norm_eps)

    def _take_turn(self, site: int, norm_weight: Tensor | None, norm_eps: float | None) -> Tensor:
        if site != self._site:
            over = self._site == self._residual.num_sites
            turn = "every site is read" if over else f"site {self._site} is next"
            raise RuntimeError(
                f"read: site {site} was asked for, but {turn}; sites are read once and in order. "
                "Under activation checkpointing keep read and write outside of the checkpointed "
                "function"
            )
        if self._pending is None:
            raise RuntimeError(
                f"read: nothing was written since site {site - 1} was read; "
                "write its sublayer's output first"
            )
        if norm_weight is not None and norm_weight.shape != (self._residual.hidden_size,):
            raise ValueError(
                f"read: norm_weight has shape {tuple(norm_weight.shape)}, "
                f"expected ({self._residual.hidden_size},)"
            )
        delta, self._pending = self._pending, None
        self._site += 1
        residual = self._residual
        if residual.mode == "standard":
            query, key_weight = residual.zero_query, None
        else:
            query, key_weight = residual.queries[site], residual.key_weights[site]
        norm = {"out_weight": norm_weight, "eps": residual.eps, "out_eps": norm_eps}
        return self._read(site, delta, query, key_weight, norm)

    @abstractmethod
    def _read(
        self, site: int, delta: Tensor, query: Tensor, key_weight: Tensor | None, norm: dict
    ) -> Tensor:
        """The mix at ``site``, with ``delta`` added to the open block before."""

    def _record(
        self, site: int, sources: list[Tensor], query: Tensor, key_weight: Tensor | None
    ) -> None:
        with torch.no_grad():
            _, weights = ops.depth_attention(
                sources,
                query,
                key_weight,
                eps=self._residual.eps,
                return_weights=True,
                save="nothing",
            )
        self._residual._record.add(site, weights)


class TrainingState(ResidualState):
    """Differentiable: blocks are a list of tensors, and their gradients gather in one buffer per
    block."""

    def __init__(self, residual: AttentionResiduals, embedding: Tensor) -> None:
        super().__init__(residual, embedding)
        self._blocks: list[Tensor] = []
        self._buffers: list[GradientBuffer | None] = []
        self._partial: Tensor | None = None
        # Phase 1 of the open block, one (out, lse) per site to come; None while sites read in a
        # single pass.
        self._phase1: list[tuple[Tensor, Tensor]] | None = None

    def _append_block(self, block: Tensor) -> None:
        buffer = GradientBuffer() if can_tap(block) else None
        self._blocks.append(block if buffer is None else tap(block, buffer))
        self._buffers.append(buffer)

    def _read(
        self, site: int, delta: Tensor, query: Tensor, key_weight: Tensor | None, norm: dict
    ) -> Tensor:
        residual = self._residual
        closes = residual.closes_block(site)
        self._begin_block(site, delta)
        if self._phase1 is not None:
            out, lse = self._phase1.pop(0)
            hidden, partial = ops.merge_partial(
                out, lse, self._partial, delta, query, key_weight, **norm
            )
            if closes:
                self._append_block(partial)
        elif closes and self._partial is None:
            # The delta is a block: as one, it gets all its gradients, this site's too, in its
            # buffer.
            partial = delta
            self._append_block(delta)
            hidden = ops.depth_attention(
                self._blocks,
                query,
                key_weight,
                **norm,
                save=residual.save,
                buffers=tuple(self._buffers),
            )
        else:
            hidden, partial = ops.accumulate_depth_attention(
                self._partial,
                delta,
                self._blocks,
                query,
                key_weight,
                **norm,
                save=residual.save,
                buffers=tuple(self._buffers),
            )
            if closes:
                self._append_block(partial)
        if residual._record is not None:
            sources = self._blocks if closes else [*self._blocks, partial]
            self._record(site, sources, query, key_weight)
        self._partial = None if closes else partial
        return hidden

    def _begin_block(self, site: int, delta: Tensor) -> None:
        """At the first site of a block, attends over the finished blocks for all of its sites,
        where that pays."""
        residual = self._residual
        if self._partial is not None or site == 0:
            return
        self._phase1 = None
        block = len(self._blocks)
        if not residual.reads_in_two_phases(block, delta, torch.is_grad_enabled()):
            return
        sites = residual.sites_of_block(block)
        out, lse = ops.inter_block_attention(
            self._blocks,
            torch.stack([residual.queries[s] for s in sites]),
            torch.stack([residual.key_weights[s] for s in sites]),
            eps=residual.eps,
            buffers=tuple(self._buffers),
        )
        self._phase1 = list(zip(out.unbind(0), lse.unbind(0), strict=True))


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
