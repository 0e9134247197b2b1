"""Residuals as a model's author would write them, in the place of ``AttentionResiduals``.

Same parameters, same reads and writes; blocks are lists of tensors and every addition, mix and norm
is an operator of its own. What mixes is a function, so that anybody's kernel can take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnres_ext.residual import AttentionResiduals

#: ``mix(sources, query, key_weight, eps, norm_weight, norm_eps)``: depth attention, normalised.
Mix = Callable[[list[Tensor], Tensor, Tensor, float, Tensor, float], Tensor]


class PlainResidual(nn.Module):
    """Stands in for ``residual``, whose parameters it shares.

    Args:
        residual: what to stand in for.
        mix: depth attention over a list; not called for the standard residual.
    """

    def __init__(self, residual: AttentionResiduals, mix: Mix) -> None:
        super().__init__()
        self.residual = residual
        self.mix = mix

    def start(self, embedding: Tensor, cache: object = None) -> PlainState:
        """Begins a forward pass; a list of blocks needs no cache."""
        return PlainState(self, embedding)

    def new_cache(self, shape: int | Sequence[int], **_: Any) -> SimpleNamespace:
        """What a decoding state keeps in the place of a block cache: nothing but a shape."""
        leading = (shape,) if isinstance(shape, int) else tuple(shape)
        return SimpleNamespace(shape=(*leading, self.residual.hidden_size))


class PlainState:
    """One forward pass: finished blocks, and the sum of the open one."""

    def __init__(self, plain: PlainResidual, embedding: Tensor) -> None:
        self._residual = plain.residual
        self._mix = plain.mix
        self._blocks: list[Tensor] = []
        self._partial: Tensor | None = embedding
        self.pending = embedding  # what was written last

    def write(self, x: Tensor) -> None:
        """Adds a sublayer's output to the open block."""
        self._partial = x if self._partial is None else self._partial + x
        self.pending = x

    def pass_on(self, x: Tensor) -> None:
        """A layer begins with what was written last."""

    def read(self, site: int, norm_weight: Tensor, norm_eps: float) -> Tensor:
        """The input of sublayer ``site``, normalised."""
        residual = self._residual
        if residual.mode == "standard":
            weight = norm_weight.to(self._partial.dtype)
            return F.rms_norm(self._partial, weight.shape, weight, norm_eps)
        # The embedding is a block of its own, closed before the first read.
        if residual.closes_block(site):
            self._blocks.append(self._partial)
            self._partial = None
        sources = [*self._blocks, *([] if self._partial is None else [self._partial])]
        query, gain = residual.queries[site], residual.key_weights[site]
        return self._mix(sources, query, gain, residual.eps, norm_weight, norm_eps)

    def read_output(self, norm_weight: Tensor, norm_eps: float) -> Tensor:
        """The model's output."""
        return self.read(self._residual.num_sublayers, norm_weight, norm_eps)
