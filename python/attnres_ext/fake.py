"""Shapes of the operators' results, for ``torch.compile`` and fake tensors; every size may be
symbolic.

Only what decides a result's shape and dtype is written here: arguments are checked by the operators
themselves, which run on real tensors before anything is traced through them. But for devices: one
tensor on the meta device among others is enough to end up here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps

import torch
from torch import Tensor

from attnres_ext import _native  # noqa: F401  (the operators must exist before their shapes)
from attnres_ext.reference import compute_dtype, result_dtype


def _shapes_of(name: str) -> Callable[[Callable], Callable]:
    """Registers the shapes of an operator's results, for tensors of one device."""
    arguments = getattr(torch.ops.attnres, name).default._schema.arguments

    def register(shapes: Callable) -> Callable:
        @wraps(shapes)
        def checked(*args, **kwargs):
            given = zip((a.name for a in arguments), args, strict=False)
            _check_one_device(name, [*given, *kwargs.items()])
            return shapes(*args, **kwargs)

        return torch.library.register_fake(f"attnres::{name}", checked)

    return register


def _check_one_device(op: str, arguments: Iterable[tuple[str, object]]) -> None:
    first: tuple[str, torch.device] | None = None
    for name, value in arguments:
        listed = isinstance(value, (list, tuple))
        for index, tensor in enumerate(value if listed else (value,)):
            if not isinstance(tensor, Tensor):
                continue
            label = f"{name}[{index}]" if listed else name
            if first is None:
                first = label, tensor.device
            elif tensor.device != first[1]:
                raise RuntimeError(
                    f"{op}: {label} is on {tensor.device}, expected {first[1]} like {first[0]}; "
                    "move all tensors to one device"
                )


def _empty(like: Tensor, shape: Sequence, dtype: torch.dtype) -> Tensor:
    return like.new_empty(tuple(shape), dtype=dtype)


def _nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((0,), dtype=dtype)


def _gradient(of: Tensor | None, like: Tensor, dtype: torch.dtype, need: bool) -> Tensor:
    """A new contiguous tensor like ``of`` if its gradient is needed, else one of no elements."""
    if need and of is not None:
        return _empty(like, of.shape, of.dtype)
    return _nothing(like, dtype)


def _source_gradients(sources: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [
        _gradient(source, source, source.dtype, need)
        for source, need in zip(sources, needs, strict=True)
    ]


def _saved(
    sources: Sequence[Tensor], dtype: torch.dtype, out_weight, save_stats: bool, save_mix: bool
):
    like = sources[0]
    stats = (
        _empty(like, (2 * len(sources) + 1, *like.shape[:-1]), dtype)
        if save_stats
        else _nothing(like, dtype)
    )
    mix = (
        _empty(like, like.shape, dtype)
        if save_mix and out_weight is not None
        else _nothing(like, dtype)
    )
    return stats, mix


@_shapes_of("depth_attention")
def _(sources, query, key_weight=None, out_weight=None, eps=1e-6, out_eps=None, scale=1.0):
    return _empty(sources[0], sources[0].shape, result_dtype(sources))


@_shapes_of("depth_attention_with_stats")
def _(
    sources, query, key_weight=None, out_weight=None, eps=1e-6, out_eps=None, scale=1.0,
    return_weights=False, save_stats=True, save_mix=False,
):  # fmt: skip
    like, dtype = sources[0], compute_dtype(sources)
    out = _empty(like, like.shape, result_dtype(sources))
    weights = (
        _empty(like, (len(sources), *like.shape[:-1]), dtype)
        if return_weights
        else _nothing(like, dtype)
    )
    return out, weights, *_saved(sources, dtype, out_weight, save_stats, save_mix)


def _weight_gradients(query, key_weight, out_weight, like, dtype, needs):
    return tuple(
        _gradient(of, like, dtype, need)
        for of, need in zip((query, key_weight, out_weight), needs, strict=True)
    )


@_shapes_of("depth_attention_backward")
def _(
    grad_out, grad_weights, sources, query, key_weight, out_weight, stats, mix, eps, out_eps,
    scale, needs
):  # fmt: skip
    dtype = compute_dtype(sources)
    weights = _weight_gradients(query, key_weight, out_weight, sources[0], dtype, needs[-3:])
    return _source_gradients(sources, needs[:-3]), *weights


@_shapes_of("depth_attention_backward_")
def _(
    grad_out, grad_weights, sources, query, key_weight, out_weight, stats, mix, eps, out_eps,
    scale, needs,
    grad_sources, accumulate,
):  # fmt: skip
    return _weight_gradients(
        query, key_weight, out_weight, sources[0], compute_dtype(sources), needs[-3:]
    )


@_shapes_of("accumulate_depth_attention")
def _(
    partial,
    delta,
    blocks,
    query,
    key_weight=None,
    out_weight=None,
    eps=1e-6,
    out_eps=None,
    scale=1.0,
):
    hidden = _empty(partial, partial.shape, result_dtype([*blocks, partial]))
    return hidden, _empty(partial, partial.shape, partial.dtype)


@_shapes_of("accumulate_depth_attention_with_stats")
def _(
    partial, delta, blocks, query, key_weight=None, out_weight=None, eps=1e-6, out_eps=None,
    scale=1.0,
    save_stats=True, save_mix=False,
):  # fmt: skip
    sources = [*blocks, partial]
    dtype = compute_dtype([*sources, delta])
    hidden = _empty(partial, partial.shape, result_dtype(sources))
    saved = _saved([partial] * len(sources), dtype, out_weight, save_stats, save_mix)
    return hidden, _empty(partial, partial.shape, partial.dtype), *saved


@_shapes_of("accumulate_depth_attention_backward")
def _(
    grad_hidden, grad_new_partial, blocks, new_partial, query, key_weight, out_weight, stats, mix,
    eps, out_eps, scale, needs,
):  # fmt: skip
    dtype = compute_dtype([*blocks, new_partial])
    weights = _weight_gradients(query, key_weight, out_weight, new_partial, dtype, needs[-3:])
    *gradients, partial = _source_gradients([*blocks, new_partial], needs[:-3])
    return gradients, partial, *weights


@_shapes_of("accumulate_depth_attention_backward_")
def _(
    grad_hidden, grad_new_partial, blocks, new_partial, query, key_weight, out_weight, stats, mix,
    eps, out_eps, scale, needs, grad_blocks, accumulate,
):  # fmt: skip
    dtype = compute_dtype([*blocks, new_partial])
    weights = _weight_gradients(query, key_weight, out_weight, new_partial, dtype, needs[-3:])
    return _gradient(new_partial, new_partial, new_partial.dtype, needs[-4]), *weights


@_shapes_of("inter_block_attention")
def _(blocks, queries, key_weights=None, eps=1e-6, scale=1.0):
    like, count = blocks[0], queries.shape[0]
    out = _empty(like, (count, *like.shape), result_dtype(blocks))
    return out, _empty(like, (count, *like.shape[:-1]), compute_dtype(blocks))


@_shapes_of("inter_block_attention_with_stats")
def _(blocks, queries, key_weights=None, eps=1e-6, scale=1.0):
    like, count, dtype = blocks[0], queries.shape[0], compute_dtype(blocks)
    out = _empty(like, (count, *like.shape), result_dtype(blocks))
    lse = _empty(like, (count, *like.shape[:-1]), dtype)
    return out, lse, _empty(like, (len(blocks) * (1 + count), *like.shape[:-1]), dtype)


@_shapes_of("inter_block_attention_backward")
def _(grad_out, grad_lse, blocks, queries, key_weights, stats, eps, scale, needs):
    dtype = compute_dtype(blocks)
    weights = (
        _gradient(queries, blocks[0], dtype, needs[-2]),
        _gradient(key_weights, blocks[0], dtype, needs[-1]),
    )
    return _source_gradients(blocks, needs[:-2]), *weights


@_shapes_of("inter_block_attention_backward_")
def _(
    grad_out,
    grad_lse,
    blocks,
    queries,
    key_weights,
    stats,
    eps,
    scale,
    needs,
    grad_blocks,
    accumulate,
):
    dtype = compute_dtype(blocks)
    return (
        _gradient(queries, blocks[0], dtype, needs[-2]),
        _gradient(key_weights, blocks[0], dtype, needs[-1]),
    )


@_shapes_of("merge_partial")
def _(
    out,
    lse,
    partial,
    delta,
    query,
    key_weight=None,
    out_weight=None,
    eps=1e-6,
    out_eps=None,
    scale=1.0,
):
    merged = [t for t in (partial if partial is not None else delta,) if t is not None]
    hidden = _empty(out, out.shape, result_dtype([out, *merged]))
    if partial is not None and delta is not None:
        return hidden, _empty(out, out.shape, partial.dtype)
    return hidden, _nothing(out, compute_dtype([out, *merged]))


@_shapes_of("merge_partial_backward")
def _(
    grad_hidden, grad_new_partial, out, lse, value, query, key_weight, out_weight, eps, out_eps,
    scale, needs
):  # fmt: skip
    dtype = compute_dtype([out] if value is None else [out, value])
    grad_lse = _empty(out, lse.shape, dtype) if needs[1] else _nothing(out, dtype)
    grad_out = _gradient(out, out, dtype, needs[0])
    grad_value = _gradient(value, out, dtype, needs[2])
    return (
        grad_out,
        grad_lse,
        grad_value,
        *_weight_gradients(query, key_weight, out_weight, out, dtype, needs[3:]),
    )


@_shapes_of("merge_partial_backward_")
def _(
    grad_hidden, grad_new_partial, out, lse, value, query, key_weight, out_weight, eps, out_eps,
    scale, needs, grad_out, grad_lse,
):  # fmt: skip
    dtype = compute_dtype([out] if value is None else [out, value])
    weights = _weight_gradients(query, key_weight, out_weight, out, dtype, needs[1:])
    return _gradient(value, out, dtype, needs[0]), *weights


@_shapes_of("block_cache_write")
def _(slots, rstd, delta, slot, add, eps=1e-6):
    return None


@_shapes_of("block_cache_attend")
def _(slots, rstd, delta, slot, add, query, key_weight, out_weight, eps, out_eps, scale, out):
    return None


@_shapes_of("block_cache_inter")
def _(slots, rstd, count, queries, key_weights, scale, out, lse):
    return None


@_shapes_of("block_cache_merge")
def _(
    slots, rstd, out, lse, delta, slot, add, query, key_weight, out_weight, eps, out_eps, scale,
    hidden
):  # fmt: skip
    return None
