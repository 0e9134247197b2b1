"""The functional API: depth attention, block summation, and attention over blocks in two phases.

Shapes: ``N`` sources, ``S`` queries, ``D`` hidden, ``...`` any leading (token) dimensions. Sources
may be float32, float64, bfloat16 or float16, each with a dtype and strides of its own; logits,
softmax and sums are float32 (float64 if any source is). Queries and gains may have any of these
dtypes. Errors are RuntimeErrors that name the operator, the argument, what came and what was
wanted; they are raised before anything is computed.

Every function is differentiable in all its tensors, and its gradients are bit-identical from run to
run. Second derivatives raise. ``torch.compile`` sees the operators under ``torch.ops.attnres``.
Function transforms (``torch.func``) run the definitions in :mod:`attnres_ext.reference`, which can
be differentiated and mapped in any way, more slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnres_ext import _native, fake, flops, reference, transforms  # noqa: F401  (registers the operators and what torch asks of them)
from attnres_ext.autograd import (
    AccumulateDepthAttention,
    DepthAttention,
    InterBlockAttention,
    MergePartial,
    Options,
    below_autograd,
)
from attnres_ext.cache import BlockCache
from attnres_ext.torch_internals import is_transformed

if TYPE_CHECKING:
    from attnres_ext.gradient_buffer import GradientBuffer

__all__ = [
    "accumulate_depth_attention",
    "depth_attention",
    "inter_block_attention",
    "merge_partial",
]

SAVE_LEVELS = ("nothing", "stats", "output")
_ops = torch.ops.attnres
_traced = torch.compiler.is_compiling

Sources = Sequence[Tensor] | Tensor | BlockCache


def depth_attention(
    sources: Sources,
    query: Tensor,
    key_weight: Tensor | None = None,
    *,
    out_weight: Tensor | None = None,
    eps: float = 1e-6,
    out_eps: float | None = None,
    scale: float = 1.0,
    return_weights: bool = False,
    save: str = "stats",
    buffers: Sequence[GradientBuffer | None] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over depth (paper, Eq. 2-4).

    ``out = sum_i softmax_i(scale * (key_weight * query) . RMSNorm(source_i)) source_i``, then, if
    ``out_weight`` is given, ``RMSNorm(out) * out_weight``: the pre-norm of the sublayer that reads.

    Args:
        sources: ``N`` tensors ``[..., D]`` (at most 256), a stack ``[N, ..., D]``, or a
            :class:`BlockCache`, whose filled slots are the sources. Never copied, unless columns
            are strided or leading dimensions need more than two strides.
        query: ``[D]``, ``[1, D]`` or ``[D, 1]``, the site's pseudo-query.
        key_weight: ``[D]``, the gain of the keys' RMSNorm; None means ones.
        out_weight: ``[D]``, the gain of the output's RMSNorm; None means no output norm.
        eps: Epsilon of the keys' RMSNorm.
        out_eps: Epsilon of the output's RMSNorm; None means ``eps``.
        scale: Factor of the logits; the paper has none.
        return_weights: Whether to return the softmax weights as well; they are differentiable.
        save: What the backward reuses: ``"nothing"`` (all is recomputed), ``"stats"`` (``8N + 4``
            bytes a token) or ``"output"`` (also the mix before the output norm, in the compute
            dtype). Gradients are the same to the bit.
        buffers: For each source, where its gradient gathers instead of going through autograd, or
            None (see :mod:`attnres_ext.gradient_buffer`).

    Returns:
        ``out [..., D]`` in the dtype that PyTorch promotes the sources to, or ``(out, weights [N,
        ...])``.
    """
    if not isinstance(sources, list):
        sources = _as_list("depth_attention: sources", sources)
    if is_transformed():
        return reference.depth_attention(
            sources, query, key_weight, out_weight=out_weight, eps=eps, out_eps=out_eps,
            scale=scale, return_weights=return_weights,
        )  # fmt: skip
    if save not in SAVE_LEVELS:
        raise RuntimeError(
            f"depth_attention: save is {save!r}, expected one of {', '.join(SAVE_LEVELS)}"
        )
    traced = _traced()
    if not traced:
        if torch.is_grad_enabled() and _needs_gradient(
            "depth_attention", (query, key_weight, out_weight, *sources)
        ):
            options = Options(eps, out_eps, scale, save, return_weights, buffers)
            return DepthAttention.apply(options, query, key_weight, out_weight, *sources)
        save = "nothing"
    with below_autograd(traced):
        if save == "nothing" and not return_weights:
            return _ops.depth_attention.default(
                sources, query, key_weight, out_weight, eps, out_eps, scale
            )
        out, weights, _, _ = _ops.depth_attention_with_stats.default(
            sources, query, key_weight, out_weight, eps, out_eps, scale,
            return_weights, save != "nothing", save == "output",
        )  # fmt: skip
    return (out, weights) if return_weights else out


def accumulate_depth_attention(
    partial: Tensor | None,
    delta: Tensor,
    blocks: Sources,
    query: Tensor,
    key_weight: Tensor | None = None,
    *,
    out_weight: Tensor | None = None,
    eps: float = 1e-6,
    out_eps: float | None = None,
    scale: float = 1.0,
    save: str = "stats",
    buffers: Sequence[GradientBuffer | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Block summation and depth attention in one pass (paper, Eq. 5-6).

    ``new_partial = partial + delta``, rounded to the partial's dtype; then depth attention over
    ``[*blocks, new_partial]`` as :func:`depth_attention` has it. The rounded sum is what is scored
    and mixed, so that the state and its use agree bit for bit.

    Args:
        partial: ``[..., D]``, the open block's running sum; None at a block's first sublayer.
        delta: ``[..., D]``, what the sublayer before this site wrote.
        blocks: Finished blocks, each ``[..., D]``; may be empty.
        query: As for :func:`depth_attention`, like the arguments that follow it.
        key_weight: ``[D]`` or None.
        out_weight: ``[D]`` or None.
        eps: Epsilon of the keys' RMSNorm.
        out_eps: Epsilon of the output's RMSNorm; None means ``eps``.
        scale: Factor of the logits.
        save: What the backward reuses.
        buffers: For each block, where its gradient gathers, or None.

    Returns:
        ``(hidden [..., D], new_partial [..., D])``. Without a partial, ``new_partial`` is ``delta``
        itself, or where gradients are recorded a view of it.
    """
    if not isinstance(blocks, list):
        blocks = _as_list("accumulate_depth_attention: blocks", blocks)
    if is_transformed():
        return reference.accumulate_depth_attention(
            partial, delta, blocks, query, key_weight, out_weight=out_weight, eps=eps,
            out_eps=out_eps, scale=scale,
        )  # fmt: skip
    if save not in SAVE_LEVELS:
        raise RuntimeError(
            f"accumulate_depth_attention: save is {save!r}, "
            f"expected one of {', '.join(SAVE_LEVELS)}"
        )
    traced = _traced()
    if not traced and torch.is_grad_enabled():
        tensors = (query, key_weight, out_weight, partial, delta, *blocks)
        if _needs_gradient("accumulate_depth_attention", tensors):
            options = Options(eps, out_eps, scale, save, False, buffers)
            return AccumulateDepthAttention.apply(
                options, query, key_weight, out_weight, partial, delta, *blocks
            )
    if partial is None:
        hidden = depth_attention(
            [*blocks, delta], query, key_weight, out_weight=out_weight, eps=eps, out_eps=out_eps,
            scale=scale, save=save,
        )  # fmt: skip
        return hidden, delta
    if not traced:
        save = "nothing"
    with below_autograd(traced):
        if save == "nothing":
            return _ops.accumulate_depth_attention.default(
                partial, delta, blocks, query, key_weight, out_weight, eps, out_eps, scale
            )
        return _ops.accumulate_depth_attention_with_stats.default(
            partial,
            delta,
            blocks,
            query,
            key_weight,
            out_weight,
            eps,
            out_eps,
            scale,
            True,
            save == "output",
        )[:2]


def inter_block_attention(
    blocks: Sources,
    queries: Tensor,
    key_weights: Tensor | None = None,
    *,
    eps: float = 1e-6,
    scale: float = 1.0,
    buffers: Sequence[GradientBuffer | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Phase 1 (paper, Algorithm 1): all pseudo-queries of a block against the finished blocks, in
    one sweep.

    Args:
        blocks: ``N`` finished blocks, each ``[..., D]``.
        queries: ``[S, D]``, one for each site of the open block.
        key_weights: ``[S, D]``, the sites' key gains; None means ones.
        eps: Epsilon of the keys' RMSNorm.
        scale: Factor of the logits.
        buffers: For each block, where its gradient gathers, or None.

    Returns:
        ``(out [S, ..., D], lse [S, ...])``: the normalised mix, and the natural logarithm of the
        sum of exponentials that :func:`merge_partial` needs to add one more source.
    """
    if not isinstance(blocks, list):
        blocks = _as_list("inter_block_attention: blocks", blocks)
    if is_transformed():
        return reference.inter_block_attention(blocks, queries, key_weights, eps=eps, scale=scale)
    if _traced():
        return _ops.inter_block_attention_with_stats.default(
            blocks, queries, key_weights, eps, scale
        )[:2]
    if torch.is_grad_enabled() and _needs_gradient(
        "inter_block_attention", (queries, key_weights, *blocks)
    ):
        options = Options(eps, None, scale, "stats", False, buffers)
        return InterBlockAttention.apply(options, queries, key_weights, *blocks)
    with below_autograd(False):
        return _ops.inter_block_attention.default(blocks, queries, key_weights, eps, scale)


def merge_partial(
    out: Tensor,
    lse: Tensor,
    partial: Tensor | None,
    delta: Tensor | None,
    query: Tensor,
    key_weight: Tensor | None = None,
    *,
    out_weight: Tensor | None = None,
    eps: float = 1e-6,
    out_eps: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Phase 2 (paper, Algorithm 1): block summation, then one more source merged into what phase 1
    found.

    Equal to attention over all blocks and the new partial at once. An empty state, ``lse = -inf``,
    leaves the partial alone, whatever ``out`` holds.

    Args:
        out: ``[..., D]``, phase 1's mix for this site.
        lse: ``[...]``, its log-sum-exp.
        partial: ``[..., D]``, the open block's running sum, or None.
        delta: ``[..., D]``, what the sublayer before this site wrote, or None.
        query: As for :func:`depth_attention`, like the arguments that follow it.
        key_weight: ``[D]`` or None.
        out_weight: ``[D]`` or None.
        eps: Epsilon of the keys' RMSNorm.
        out_eps: Epsilon of the output's RMSNorm; None means ``eps``.
        scale: Factor of the partial's logit.

    Returns:
        ``(hidden [..., D], new_partial)``. ``new_partial`` is the rounded sum where both a partial
        and a delta are given, else the one that is given, else None.
    """
    if is_transformed():
        return reference.merge_partial(
            out, lse, partial, delta, query, key_weight, out_weight=out_weight, eps=eps,
            out_eps=out_eps, scale=scale,
        )  # fmt: skip
    if _traced():
        hidden, new_partial = _ops.merge_partial.default(
            out, lse, partial, delta, query, key_weight, out_weight, eps, out_eps, scale
        )
    elif torch.is_grad_enabled() and _needs_gradient(
        "merge_partial", (out, lse, partial, delta, query, key_weight, out_weight)
    ):
        options = Options(eps, out_eps, scale, "nothing", False, None)
        hidden, new_partial = MergePartial.apply(
            options, out, lse, partial, delta, query, key_weight, out_weight
        )
    else:
        with below_autograd(False):
            hidden, new_partial = _ops.merge_partial.default(
                out, lse, partial, delta, query, key_weight, out_weight, eps, out_eps, scale
            )
    if partial is not None and delta is not None:
        return hidden, new_partial
    return hidden, partial if delta is None else delta


def _as_list(name: str, sources: Sources) -> list[Tensor]:
    if isinstance(sources, BlockCache):
        return sources.sources()
    if isinstance(sources, Tensor):
        return list(sources.unbind(0))
    try:
        return list(sources)
    except TypeError:
        raise TypeError(f"{name} is {_kind(sources)}, expected tensors") from None


#: Tensors of each operator as `_needs_gradient` gets them; the last name of three of them is that
#: of a list.
_TENSORS = {
    "depth_attention": ("query", "key_weight", "out_weight", "sources"),
    "accumulate_depth_attention": (
        "query", "key_weight", "out_weight", "partial", "delta", "blocks",
    ),
    "inter_block_attention": ("queries", "key_weights", "blocks"),
    "merge_partial": ("out", "lse", "partial", "delta", "query", "key_weight", "out_weight"),
}  # fmt: skip


def _needs_gradient(op: str, tensors: Sequence[Tensor | None]) -> bool:
    try:
        for tensor in tensors:  # noqa: SIM110 (a generator takes twice the time)
            if tensor is not None and tensor.requires_grad:
                return True
        return False
    except AttributeError:
        index = next(i for i, t in enumerate(tensors) if not isinstance(t, Tensor | None))
        names = _TENSORS[op]
        single = len(names) if op == "merge_partial" else len(names) - 1
        name = names[index] if index < single else f"{names[-1]}[{index - single}]"
        raise TypeError(f"{op}: {name} is {_kind(tensors[index])}, expected a tensor") from None


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
