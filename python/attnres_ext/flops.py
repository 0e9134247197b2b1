"""How many floating-point operations each operator makes, for ``FlopCounterMode``.

Counted as PyTorch counts its own: two for each multiplication and addition of the definition's
inner products and weighted sums, nothing for what is done element by element (norms, softmax, block
summation). A forward scores and mixes its sources; a backward has the gradients of softmax weights,
of the query with its key gain, and of each source as key and as value, where they are needed. What
a kernel computes again instead of reading it is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from attnres_ext import _native  # noqa: F401  (the operators must exist before their formulas)

__all__: list[str] = []

_ops = torch.ops.attnres
Shape = Sequence[int]


def _formula(*operators: Any):
    return register_flop_formula(list(operators))


def _attention(sources: Sequence[Shape], queries: int = 1) -> int:
    """Scores and mixes, for each query."""
    return 4 * queries * len(sources) * prod(sources[0])


def _attention_backward(sources: Sequence[Shape], needs: Sequence[bool], queries: int = 1) -> int:
    """``needs``: for each source, then whether query and key gain need a gradient."""
    count = len(sources)
    learns = any(needs[count : count + 2])
    return 2 * queries * prod(sources[0]) * (count + count * learns + 2 * sum(needs[:count]))


@_formula(_ops.depth_attention, _ops.depth_attention_with_stats)
def _(sources, *_, **__) -> int:
    return _attention(sources)


@_formula(_ops.depth_attention_backward, _ops.depth_attention_backward_)
def _(
    grad_out, grad_weights, sources, query, key_weight, out_weight, stats, mix, eps, out_eps, scale,
    needs, *_, **__,
) -> int:  # fmt: skip
    return _attention_backward(sources, needs)


@_formula(_ops.accumulate_depth_attention, _ops.accumulate_depth_attention_with_stats)
def _(partial, delta, blocks, *_, **__) -> int:
    return _attention([*blocks, partial])


@_formula(_ops.accumulate_depth_attention_backward, _ops.accumulate_depth_attention_backward_)
def _(
    grad_hidden, grad_new_partial, blocks, new_partial, query, key_weight, out_weight, stats, mix,
    eps, out_eps, scale, needs, *_, **__,
) -> int:  # fmt: skip
    return _attention_backward([*blocks, new_partial], needs)


@_formula(_ops.inter_block_attention, _ops.inter_block_attention_with_stats)
def _(blocks, queries, *_, **__) -> int:
    return _attention(blocks, queries[0])


@_formula(_ops.inter_block_attention_backward, _ops.inter_block_attention_backward_)
def _(
    grad_out, grad_lse, blocks, queries, key_weights, stats, eps, scale, needs, *_, **__
) -> int:  # fmt: skip
    return _attention_backward(blocks, needs, queries[0])


def _merge(size: int) -> int:
    """One more source is scored, and mixed with what there is."""
    return 6 * size


@_formula(_ops.merge_partial)
def _(out, lse, partial, delta, *_, **__) -> int:
    return 0 if partial is None and delta is None else _merge(prod(out))


def _merge_backward(
    out: Shape, value: Shape | None, out_needed: bool, needs: Sequence[bool]
) -> int:
    """``needs``: of the value, query and key gain."""
    if value is None:
        return 0
    return 2 * prod(out) * (2 + out_needed + 2 * needs[0] + any(needs[1:3]))


@_formula(_ops.merge_partial_backward)
def _(
    grad_hidden, grad_new_partial, out, lse, value, query, key_weight, out_weight, eps, out_eps,
    scale, needs, *_, **__,
) -> int:  # fmt: skip
    return _merge_backward(out, value, needs[0], needs[2:])


@_formula(_ops.merge_partial_backward_)
def _(
    grad_hidden, grad_new_partial, out, lse, value, query, key_weight, out_weight, eps, out_eps,
    scale, needs, *_, **__,
) -> int:  # fmt: skip
    return _merge_backward(out, value, True, needs)


@_formula(_ops.block_cache_write)
def _(*_, **__) -> int:
    return 0


@_formula(_ops.block_cache_attend)
def _(slots, rstd, delta, slot, *_, **__) -> int:
    return _attention([slots[1:]] * (slot + 1))


@_formula(_ops.block_cache_inter)
def _(slots, rstd, count, queries, *_, **__) -> int:
    return _attention([slots[1:]] * count, queries[0])


@_formula(_ops.block_cache_merge)
def _(slots, *_, **__) -> int:
    return _merge(prod(slots[1:]))
