"""``torch.func`` over the operators themselves: a transform runs an operator's definition.

PyTorch's registration of operators gives them a backward, which transforms do not take. A kernel
for the key under which transforms see a call first, before they look at its tensors, can answer it
with other operators, and :mod:`attnres_ext.reference` can be transformed in any way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnres_ext import _native, reference  # noqa: F401  (the operators must exist before)
from attnres_ext.torch_internals import TRANSFORMS

_library = torch.library.Library("attnres", "IMPL")


def _depth_attention(
    sources, query, key_weight=None, out_weight=None, eps=1e-6, out_eps=None, scale=1.0
) -> Tensor:
    return reference.depth_attention(
        sources, query, key_weight, out_weight=out_weight, eps=eps, out_eps=out_eps, scale=scale
    )


def _accumulate_depth_attention(
    partial, delta, blocks, query, key_weight=None, out_weight=None, eps=1e-6, out_eps=None,
    scale=1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return reference.accumulate_depth_attention(
        partial, delta, blocks, query, key_weight, out_weight=out_weight, eps=eps,
        out_eps=out_eps, scale=scale,
    )  # fmt: skip


def _inter_block_attention(
    blocks, queries, key_weights=None, eps=1e-6, scale=1.0
) -> tuple[Tensor, Tensor]:
    return reference.inter_block_attention(blocks, queries, key_weights, eps=eps, scale=scale)


def _merge_partial(
    out, lse, partial, delta, query, key_weight=None, out_weight=None, eps=1e-6, out_eps=None,
    scale=1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden, new_partial = reference.merge_partial(
        out, lse, partial, delta, query, key_weight, out_weight=out_weight, eps=eps,
        out_eps=out_eps, scale=scale,
    )  # fmt: skip
    if partial is None or delta is None:  # nothing new: an operator returns no argument
        new_partial = hidden.new_empty(0)
    return hidden, new_partial


for _definition in (
    _depth_attention,
    _accumulate_depth_attention,
    _inter_block_attention,
    _merge_partial,
):
    _library.impl(_definition.__name__.removeprefix("_"), _definition, TRANSFORMS)
