"""Who connects the layers of a stack: variants of the residual, each by one implementation.

Beside this library's own are residuals as a model's author would write them, with the same
parameters, reads and writes: blocks are lists of tensors, and every addition, mix and norm is an
operator of its own. What mixes is a function, so that anybody's kernel can take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnres_ext import AttentionResiduals, reference

from .baselines import missing_fla

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


@dataclass(frozen=True)
class Variant:
    """One residual by one implementation.

    Attributes:
        residual: "standard", "block" or "full".
        baseline: whose.
        make: its module from ``AttentionResiduals``, whose parameters it shares.
        unavailable: ``unavailable(device)`` says why it cannot run there, or None.
    """

    residual: str
    baseline: str
    make: Callable[[AttentionResiduals], nn.Module]
    unavailable: Callable[[str], str | None] = lambda device: None

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.residual}, {self.baseline}"


def _eager(
    sources: list[Tensor], query: Tensor, gain: Tensor, eps: float, weight: Tensor, out_eps: float
) -> Tensor:
    return reference.depth_attention(
        sources, query, gain, out_weight=weight, eps=eps, out_eps=out_eps
    )


def _fla(
    sources: list[Tensor], query: Tensor, gain: Tensor, eps: float, weight: Tensor, out_eps: float
) -> Tensor:
    from fla.ops.attnres import fused_attnres

    # Its norms share one epsilon, and so do Kimi Linear's.
    return fused_attnres(query, sources, gain, output_rms_weight=weight, rms_eps=out_eps)


def _as_it_is(residual: AttentionResiduals) -> nn.Module:
    return residual


#: The yardstick comes first: this library's standard residual, one kernel that adds and normalises
#: at every site, and so the strictest measure of what attention over depth costs.
VARIANTS = (
    Variant("standard", "standard", _as_it_is),
    Variant("standard", "eager", partial(PlainResidual, mix=_eager)),
    *(
        Variant(residual, who, make, unavailable)
        for residual in ("block", "full")
        for who, make, unavailable in (
            ("ours", _as_it_is, lambda device: None),
            ("eager", partial(PlainResidual, mix=_eager), lambda device: None),
            ("fla", partial(PlainResidual, mix=_fla), missing_fla),
        )
    ),
)
#: Whose time the others' is compared with.
YARDSTICK = VARIANTS[0]
