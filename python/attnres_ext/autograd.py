"""Derivatives of the operators.

Each operator has its derivative twice over one formula: as an ``autograd.Function`` that the
functional API applies in eager mode (a third of the dispatcher's overhead, and source gradients may
gather in buffers, see :mod:`attnres_ext.gradient_buffer`), and registered on the operator itself,
which is what ``torch.compile``, ``torch.func`` and direct calls of ``torch.ops.attnres.*``
differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attnres_ext import _native  # noqa: F401  (the operators must exist before their derivatives)
from attnres_ext.first_order import first_order_only, raise_second_derivative
from attnres_ext.side_stream import current_stream
from attnres_ext.torch_internals import BelowAutograd

if TYPE_CHECKING:
    from attnres_ext.gradient_buffer import GradientBuffer

__all__ = [
    "AccumulateDepthAttention",
    "DepthAttention",
    "InterBlockAttention",
    "MergePartial",
    "Options",
    "accumulate_gradients",
    "below_autograd",
    "inter_block_gradients",
    "like",
    "wanted",
]

_ops = torch.ops.attnres
_nothing = nullcontext()
_MOST_ARGUMENTS = 12


class Options(NamedTuple):
    """What an operator takes beside tensors; names as in the functional API."""

    eps: float
    out_eps: float | None
    scale: float
    save: str
    return_weights: bool
    buffers: Sequence[GradientBuffer | None] | None


def below_autograd(traced: bool) -> AbstractContextManager:
    """Calls inside go straight to the backend: the caller sees to derivatives, or knows that there
    are none."""
    return _nothing if traced else BelowAutograd()


def _deposit(
    buffers: Sequence[GradientBuffer | None], sources: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[list[Tensor], list[bool], list[Tensor | None]]:
    """Where each needed source gradient goes: into its buffer, or a new tensor that autograd gets.

    Returns:
        ``(gradients, accumulate, returned)``: one tensor and one flag for each source that needs a
        gradient, and for every source what autograd is handed.
    """
    gradients, accumulate, returned = [], [], []
    stream = current_stream(sources[0].device) if sources else None
    for source, buffer, need in zip(sources, buffers, needs, strict=True):
        own = None
        if need:
            if buffer is None:
                own, add = torch.empty_like(source, memory_format=torch.contiguous_format), False
                gradients.append(own)
            else:
                slot, add = buffer.slot(source, stream)
                # Below autograd nobody else tells who saved the slot that it changes.
                torch.autograd.graph.increment_version(slot)
                gradients.append(slot)
            accumulate.append(add)
        returned.append(own)
    return gradients, accumulate, returned


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients as autograd takes them: None where none is needed."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _registered(backward: Callable) -> Callable:
    """Adapts ``backward(ctx, needs, *gradients)`` to the arguments that an operator was called
    with.

    The dispatcher drops trailing arguments that equal their defaults, and wants one gradient for
    each of the others.
    """

    def adapted(ctx, *gradients):
        given = len(ctx.needs_input_grad)
        needs = [*ctx.needs_input_grad, *(False,) * _MOST_ARGUMENTS]
        return (*backward(ctx, needs, *gradients), *(None,) * _MOST_ARGUMENTS)[:given]

    return adapted


# depth_attention


def _depth_attention_gradients(
    saved: Sequence[Tensor | None],
    options: Options,
    needs: list[bool],
    grad_out: Tensor,
    grad_weights: Tensor | None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the sources, and of query, key_weight and out_weight."""
    query, key_weight, out_weight, stats, mix, *sources = saved
    arguments = (
        grad_out, grad_weights, sources, query, key_weight, out_weight, stats, mix,
        options.eps, options.out_eps, options.scale, needs,
    )  # fmt: skip
    if options.buffers is None:
        gradients, *weights = _ops.depth_attention_backward.default(*arguments)
        returned = wanted(gradients, needs[:-3])
    else:
        gradients, accumulate, returned = _deposit(options.buffers, sources, needs[:-3])
        weights = _ops.depth_attention_backward_.default(*arguments, gradients, accumulate)
    return returned, wanted(weights, needs[-3:])


class DepthAttention(torch.autograd.Function):
    """``apply(options, query, key_weight, out_weight, *sources)`` -> ``out[, weights]``."""

    @staticmethod
    def forward(ctx, options, query, key_weight, out_weight, *sources):
        with below_autograd(False):
            arguments = (
                list(sources),
                query,
                key_weight,
                out_weight,
                options.eps,
                options.out_eps,
                options.scale,
            )
            stats = mix = None
            if options.save == "nothing" and not options.return_weights:
                out = _ops.depth_attention.default(*arguments)
            else:
                out, weights, stats, mix = _ops.depth_attention_with_stats.default(
                    *arguments,
                    options.return_weights,
                    options.save != "nothing",
                    options.save == "output",
                )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key_weight, out_weight, stats, mix, *sources)
        ctx.options = options
        return (out, weights) if options.return_weights else out

    @staticmethod
    @first_order_only
    def backward(ctx, grad_out, grad_weights=None):
        needs = ctx.needs_input_grad
        saved = ctx.saved_tensors
        if grad_out is None:
            if grad_weights is None:
                return (None,) * len(needs)
            grad_out = _zero_gradient(saved[5:])
        with below_autograd(False):
            sources, weights = _depth_attention_gradients(
                saved, ctx.options, [*needs[4:], *needs[1:4]], grad_out, grad_weights
            )
        return None, *weights, *sources


def _setup_depth_attention(ctx, inputs, output) -> None:
    sources, query, key_weight, out_weight, eps, out_eps, scale, *flags = inputs
    stats = mix = None
    if flags:
        _, weights, stats, mix = output
        return_weights = flags[0]
        ctx.mark_non_differentiable(*([] if return_weights else [weights]), stats, mix)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key_weight, out_weight, stats, mix, *sources)
    ctx.options = Options(eps, out_eps, scale, "nothing", False, None)


@_registered
def _depth_attention_backward(ctx, needs, grad_out, grad_weights=None, *_):
    saved = ctx.saved_tensors
    if grad_out is None:
        if grad_weights is None:
            return [None] * (len(saved) - 5), None, None, None
        grad_out = _zero_gradient(saved[5:])
    sources, weights = _depth_attention_gradients(
        saved, ctx.options, [*needs[0], *needs[1:4]], grad_out, grad_weights
    )
    return sources, *weights


def _zero_gradient(sources: Sequence[Tensor]) -> Tensor:
    """The gradient of an output that nothing depends on, as one value seen from everywhere."""
    if hasattr(sources[0], "to_local"):  # a DTensor is not expanded
        return torch.zeros_like(sources[0])
    return torch.zeros((), dtype=sources[0].dtype, device=sources[0].device).expand(
        sources[0].shape
    )


# accumulate_depth_attention


def accumulate_gradients(
    saved: Sequence[Tensor | None],
    options: Options,
    needs: list[bool],
    grad_hidden: Tensor | None,
    grad_new_partial: Tensor | None,
) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None]]:
    """Gradients of the blocks, of the new partial, and of query, key_weight and out_weight."""
    query, key_weight, out_weight, stats, mix, new_partial, *blocks = saved
    if grad_hidden is None:
        return [None] * len(blocks), grad_new_partial, [None] * 3
    arguments = (
        grad_hidden, grad_new_partial, blocks, new_partial, query, key_weight, out_weight, stats,
        mix,
        options.eps, options.out_eps, options.scale, needs,
    )  # fmt: skip
    if options.buffers is None:
        gradients, partial, *weights = _ops.accumulate_depth_attention_backward.default(*arguments)
        returned = wanted(gradients, needs[:-4])
    else:
        gradients, accumulate, returned = _deposit(options.buffers, blocks, needs[:-4])
        partial, *weights = _ops.accumulate_depth_attention_backward_.default(
            *arguments, gradients, accumulate
        )
    return returned, partial if needs[-4] else None, wanted(weights, needs[-3:])


def like(gradient: Tensor | None, dtype: torch.dtype, need: bool) -> Tensor | None:
    """``gradient`` in the dtype of what it is the gradient of, if it is needed."""
    return gradient.to(dtype) if need and gradient is not None else None


class AccumulateDepthAttention(torch.autograd.Function):
    """``apply(options, query, key_weight, out_weight, partial, delta, *blocks)`` -> ``(hidden,
    new_partial)``.

    Without a partial the new one is delta itself. Its gradient as such is added in the kernel to
    the one it has for being read here, as that of a sum is.
    """

    @staticmethod
    def forward(ctx, options, query, key_weight, out_weight, partial, delta, *blocks):
        read = query, key_weight, out_weight, options.eps, options.out_eps, options.scale
        save_mix = options.save == "output"
        stats = mix = None
        with below_autograd(False):
            if partial is None:
                new_partial = delta
                if options.save == "nothing":
                    hidden = _ops.depth_attention.default([*blocks, delta], *read)
                else:
                    hidden, _, stats, mix = _ops.depth_attention_with_stats.default(
                        [*blocks, delta], *read, False, True, save_mix
                    )
            elif options.save == "nothing":
                hidden, new_partial = _ops.accumulate_depth_attention.default(
                    partial, delta, list(blocks), *read
                )
            else:
                hidden, new_partial, stats, mix = (
                    _ops.accumulate_depth_attention_with_stats.default(
                        partial, delta, list(blocks), *read, True, save_mix
                    )
                )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key_weight, out_weight, stats, mix, new_partial, *blocks)
        ctx.options = options
        ctx.dtypes = None if partial is None else partial.dtype, delta.dtype
        return hidden, delta.view_as(delta) if partial is None else new_partial

    @staticmethod
    @first_order_only
    def backward(ctx, grad_hidden, grad_new_partial):
        needs = ctx.needs_input_grad
        saved = ctx.saved_tensors  # unpacking may recompute them, which wants autograd
        with below_autograd(False):
            blocks, partial, weights = accumulate_gradients(
                saved,
                ctx.options,
                [*needs[6:], needs[4] or needs[5], *needs[1:4]],
                grad_hidden,
                grad_new_partial,
            )
        # The sum's gradient is that of both its terms: one tensor, handed out twice.
        partial_dtype, delta_dtype = ctx.dtypes
        return (
            None,
            *weights,
            like(partial, partial_dtype, needs[4]),
            like(partial, delta_dtype, needs[5]),
            *blocks,
        )


def _setup_accumulate(ctx, inputs, output) -> None:
    partial, delta, blocks, query, key_weight, out_weight, eps, out_eps, scale, *flags = inputs
    stats = mix = None
    new_partial = output[1]
    if flags:
        _, _, stats, mix = output
        ctx.mark_non_differentiable(stats, mix)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key_weight, out_weight, stats, mix, new_partial, *blocks)
    ctx.options = Options(eps, out_eps, scale, "nothing", False, None)
    ctx.dtypes = partial.dtype, delta.dtype


@_registered
def _accumulate_backward(ctx, needs, grad_hidden, grad_new_partial, *_):
    blocks, partial, weights = accumulate_gradients(
        ctx.saved_tensors,
        ctx.options,
        [*needs[2], needs[0] or needs[1], *needs[3:6]],
        grad_hidden,
        grad_new_partial,
    )
    partial_dtype, delta_dtype = ctx.dtypes
    return (
        like(partial, partial_dtype, needs[0]),
        like(partial, delta_dtype, needs[1]),
        blocks,
        *weights,
    )


# inter_block_attention


def inter_block_gradients(
    saved: Sequence[Tensor | None],
    options: Options,
    needs: list[bool],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the blocks, and of queries and key_weights."""
    queries, key_weights, stats, *blocks = saved
    if grad_out is None and grad_lse is None:
        return [None] * len(blocks), [None] * 2
    arguments = (
        grad_out, grad_lse, blocks, queries, key_weights, stats, options.eps, options.scale, needs
    )  # fmt: skip
    if options.buffers is None:
        gradients, *weights = _ops.inter_block_attention_backward.default(*arguments)
        returned = wanted(gradients, needs[:-2])
    else:
        gradients, accumulate, returned = _deposit(options.buffers, blocks, needs[:-2])
        weights = _ops.inter_block_attention_backward_.default(*arguments, gradients, accumulate)
    return returned, wanted(weights, needs[-2:])


class InterBlockAttention(torch.autograd.Function):
    """``apply(options, queries, key_weights, *blocks)`` -> ``(out, lse)``."""

    @staticmethod
    def forward(ctx, options, queries, key_weights, *blocks):
        with below_autograd(False):
            out, lse, stats = _ops.inter_block_attention_with_stats.default(
                list(blocks), queries, key_weights, options.eps, options.scale
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, key_weights, stats, *blocks)
        ctx.options = options
        return out, lse

    @staticmethod
    @first_order_only
    def backward(ctx, grad_out, grad_lse):
        needs = ctx.needs_input_grad
        saved = ctx.saved_tensors
        with below_autograd(False):
            blocks, weights = inter_block_gradients(
                saved, ctx.options, [*needs[3:], *needs[1:3]], grad_out, grad_lse
            )
        return None, *weights, *blocks


def _setup_inter_block(ctx, inputs, output) -> None:
    blocks, queries, key_weights, eps, scale = inputs
    stats = None
    if len(output) == 3:
        stats = output[2]
        ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(queries, key_weights, stats, *blocks)
    ctx.options = Options(eps, None, scale, "nothing", False, None)


@_registered
def _inter_block_backward(ctx, needs, grad_out, grad_lse, *_):
    blocks, weights = inter_block_gradients(
        ctx.saved_tensors, ctx.options, [*needs[0], *needs[1:3]], grad_out, grad_lse
    )
    return blocks, *weights


# merge_partial


def _merge_gradients(
    ctx, saved: Sequence[Tensor | None], needs: Sequence[bool], grad_hidden, grad_new_partial
) -> tuple[Tensor | None, ...]:
    """Gradients of out, lse, partial, delta, query, key_weight and out_weight."""
    out, lse, value, query, key_weight, out_weight = saved
    options = ctx.options
    needs_value = needs[2] or needs[3]
    if grad_hidden is None:
        grad_value, others = grad_new_partial, [None] * 5
    else:
        flags = [needs[0], needs[1], needs_value, *needs[4:7]]
        grad_out, grad_lse, grad_value, *weights = _ops.merge_partial_backward.default(
            grad_hidden, grad_new_partial, out, lse, value, query, key_weight, out_weight,
            options.eps, options.out_eps, options.scale, flags,
        )  # fmt: skip
        others = wanted([grad_out, grad_lse.to(lse.dtype), *weights], [*needs[:2], *needs[4:7]])
    partial_dtype, delta_dtype = ctx.dtypes
    return (
        *others[:2],
        like(grad_value, partial_dtype, needs[2]),
        like(grad_value, delta_dtype, needs[3]),
        *others[2:],
    )


def _save_merge(
    ctx, options, out, lse, partial, delta, query, key_weight, out_weight, new_partial
) -> None:
    value = new_partial
    if partial is None or delta is None:
        value = partial if delta is None else delta
        ctx.mark_non_differentiable(new_partial)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, value, query, key_weight, out_weight)
    ctx.options = options
    ctx.dtypes = None if partial is None else partial.dtype, None if delta is None else delta.dtype


class MergePartial(torch.autograd.Function):
    """``apply(options, out, lse, partial, delta, query, key_weight, out_weight)`` -> ``(hidden,
    new_partial)``."""

    @staticmethod
    def forward(ctx, options, *tensors):
        with below_autograd(False):
            hidden, new_partial = _ops.merge_partial.default(
                *tensors, options.eps, options.out_eps, options.scale
            )
        _save_merge(ctx, options, *tensors, new_partial)
        return hidden, new_partial

    @staticmethod
    @first_order_only
    def backward(ctx, grad_hidden, grad_new_partial):
        saved = ctx.saved_tensors
        with below_autograd(False):
            return None, *_merge_gradients(
                ctx, saved, ctx.needs_input_grad[1:], grad_hidden, grad_new_partial
            )


def _setup_merge(ctx, inputs, output) -> None:
    *tensors, eps, out_eps, scale = inputs
    _save_merge(ctx, Options(eps, out_eps, scale, "nothing", False, None), *tensors, output[1])


@_registered
def _merge_backward(ctx, needs, grad_hidden, grad_new_partial):
    return _merge_gradients(ctx, ctx.saved_tensors, needs, grad_hidden, grad_new_partial)


def _register() -> None:
    for name, setup, backward in (
        ("depth_attention", _setup_depth_attention, _depth_attention_backward),
        ("accumulate_depth_attention", _setup_accumulate, _accumulate_backward),
        ("inter_block_attention", _setup_inter_block, _inter_block_backward),
        ("merge_partial", _setup_merge, _merge_backward),
    ):
        forms = (name, f"{name}_with_stats") if name != "merge_partial" else (name,)
        for form in forms:
            torch.library.register_autograd(f"attnres::{form}", backward, setup_context=setup)
        torch.library.register_autograd(f"attnres::{name}_backward", raise_second_derivative)


_register()
