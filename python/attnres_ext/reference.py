"""The definition of every operator, in plain PyTorch.

Each function here takes the arguments of the public function of the same name, works on any device
and is differentiable by autograd. The compiled operators are tested against these functions
evaluated in float64. Shapes: ``N`` sources, ``S`` queries, ``D`` hidden, ``...`` any leading
(token) dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "accumulate_depth_attention",
    "depth_attention",
    "inter_block_attention",
    "merge_partial",
]


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of logits, softmax and sums: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype an operator returns: what PyTorch promotes its sources to."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension: ``x / sqrt(mean(x^2) + eps) * weight``, in x's dtype."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight.to(x.dtype)


def logits(
    values: Tensor, query: Tensor, key_weight: Tensor | None, eps: float, scale: float
) -> Tensor:
    """``scale * <query, RMSNorm(value) * key_weight>`` of each row, ``[...]`` (paper, Eq. 2)."""
    return scale * (rms_norm(values, key_weight, eps) * query.to(values.dtype)).sum(-1)


def depth_attention(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor | None = None,
    *,
    out_weight: Tensor | None = None,
    eps: float = 1e-6,
    out_eps: float | None = None,
    scale: float = 1.0,
    return_weights: bool = False,
    save: str = "stats",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over depth (paper, Eq. 2-4).

    Keys are RMS-normalised sources, values are the sources themselves. Everything is computed in
    float32 (float64 if any source is) and rounded once, to the output's dtype.

    Args:
        sources: ``N`` tensors ``[..., D]``.
        query: Pseudo-query ``[D]``, ``[1, D]`` or ``[D, 1]``.
        key_weight: Gain of the key RMSNorm ``[D]``; None means ones.
        out_weight: Gain ``[D]`` of an RMSNorm of the output; None means no output norm.
        eps: Epsilon of the key RMSNorm.
        out_eps: Epsilon of the output RMSNorm; None means ``eps``.
        scale: Factor of the logits.
        return_weights: Whether to return the softmax weights, too.
        save: Accepted as by the operator; autograd decides here what is kept.

    Returns:
        ``out [..., D]``, or ``(out, weights [N, ...])``.
    """
    dtype = compute_dtype(sources)
    values = torch.stack([source.to(dtype) for source in sources])  # [N, ..., D]
    scores = logits(values, query.reshape(-1), key_weight, eps, scale)  # [N, ...]
    weights = torch.softmax(scores, dim=0)
    out = (weights.unsqueeze(-1) * values).sum(0)
    if out_weight is not None:
        out = rms_norm(out, out_weight, eps if out_eps is None else out_eps)
    out = out.to(result_dtype(sources))
    return (out, weights) if return_weights else out


def accumulate_depth_attention(
    partial: Tensor | None,
    delta: Tensor,
    blocks: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor | None = None,
    *,
    out_weight: Tensor | None = None,
    eps: float = 1e-6,
    out_eps: float | None = None,
    scale: float = 1.0,
    save: str = "stats",
) -> tuple[Tensor, Tensor]:
    """Block summation, then depth attention over ``[*blocks, partial + delta]`` (paper, Eq. 5-6).

    Args:
        partial: Running sum of the open block ``[..., D]``; None at its first sublayer.
        delta: What the last sublayer wrote ``[..., D]``.
        blocks: Finished blocks, each ``[..., D]``; may be empty.
        query: As for ``depth_attention``, like the arguments that follow.
        key_weight: ``[D]`` or None.
        out_weight: ``[D]`` or None.
        eps: Epsilon of the key RMSNorm.
        out_eps: Epsilon of the output RMSNorm; None means ``eps``.
        scale: Factor of the logits.
        save: Accepted as by the operator.

    Returns:
        ``(hidden [..., D], new_partial [..., D])``.
    """
    new_partial = add_to_partial(partial, delta)
    hidden = depth_attention(
        [*blocks, new_partial],
        query,
        key_weight,
        out_weight=out_weight,
        eps=eps,
        out_eps=out_eps,
        scale=scale,
    )
    return hidden, new_partial


def add_to_partial(partial: Tensor | None, delta: Tensor) -> Tensor:
    """``partial + delta`` rounded to the partial's dtype; a block's first delta is its partial.

    The rounded sum is what is scored and mixed, so that the state and its use agree bit for bit.
    """
    if partial is None:
        return delta
    dtype = compute_dtype([partial, delta])
    return (partial.to(dtype) + delta.to(dtype)).to(partial.dtype)


def inter_block_attention(
    blocks: Sequence[Tensor],
    queries: Tensor,
    key_weights: Tensor | None = None,
    *,
    eps: float = 1e-6,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Phase 1: every query of a block against the finished blocks (paper, Algorithm 1).

    Args:
        blocks: ``N`` finished blocks, each ``[..., D]``.
        queries: Pseudo-queries of the block's sites ``[S, D]``.
        key_weights: Their key gains ``[S, D]``; None means ones.
        eps: Epsilon of the key RMSNorm.
        scale: Factor of the logits.

    Returns:
        ``(out [S, ..., D], lse [S, ...])``: the mixes, and the natural logarithms of their sums of
        exponentials in the compute dtype.
    """
    dtype = compute_dtype(blocks)
    values = torch.stack([block.to(dtype) for block in blocks])  # [N, ..., D]
    outs, lses = [], []
    for s in range(queries.shape[0]):
        key_weight = None if key_weights is None else key_weights[s]
        scores = logits(values, queries[s], key_weight, eps, scale)  # [N, ...]
        out = (torch.softmax(scores, dim=0).unsqueeze(-1) * values).sum(0)
        outs.append(out.to(result_dtype(blocks)))
        lses.append(torch.logsumexp(scores, dim=0))
    return torch.stack(outs), torch.stack(lses)


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
    """Phase 2: phase 1's result merged with the open block's partial sum (paper, Algorithm 1).

    Args:
        out: Phase 1's mix for this site ``[..., D]``.
        lse: Its log-sum-exp ``[...]``; ``-inf`` is an empty state, whatever ``out`` holds.
        partial: Running sum of the open block ``[..., D]``, or None.
        delta: What the last sublayer wrote ``[..., D]``, or None.
        query: As for ``depth_attention``, like the arguments that follow.
        key_weight: ``[D]`` or None.
        out_weight: ``[D]`` or None.
        eps: Epsilon of the key RMSNorm.
        out_eps: Epsilon of the output RMSNorm; None means ``eps``.
        scale: Factor of the partial's logit.

    Returns:
        ``(hidden [..., D], new_partial [..., D])``; without partial and delta ``new_partial`` is
        None, and the hidden state is ``out``, normalised if asked.
    """
    new_partial = partial if delta is None else add_to_partial(partial, delta)
    tensors = [out] if new_partial is None else [out, new_partial]
    dtype = compute_dtype(tensors)
    hidden = out.to(dtype)
    if new_partial is not None:
        value = new_partial.to(dtype)
        score = logits(value, query.reshape(-1), key_weight, eps, scale)
        weights = torch.softmax(torch.stack([lse.to(dtype), score]), dim=0).unsqueeze(-1)
        # An empty state has weight 0, but 0 * NaN would be NaN.
        hidden = torch.where(weights[0] > 0, weights[0] * hidden, torch.zeros_like(hidden))
        hidden = hidden + weights[1] * value
    if out_weight is not None:
        hidden = rms_norm(hidden, out_weight, eps if out_eps is None else out_eps)
    return hidden.to(result_dtype(tensors)), new_partial
