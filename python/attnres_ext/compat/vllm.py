"""``attn_res`` as in vLLM (``vllm.models.kimi_k3``): inference, in place on prefix and blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from attnres_ext import ops

__all__ = ["attn_res"]


@torch.no_grad()
def attn_res(
    prefix: Tensor,
    delta: Tensor | None,
    blocks: Tensor,
    norm_weight: Tensor,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_norm_eps: float,
) -> Tensor:
    """Adds ``delta`` to the prefix, files it as a block, attends over blocks and prefix.

    In this order: ``prefix += delta``, rounded to the prefix's dtype and written back; ``blocks[:,
    block_write_idx] = prefix``; depth attention over ``blocks[:, :num_blocks]`` and then the
    prefix, in float32 (paper, Eq. 5-6); RMSNorm; one rounding, to the prefix's dtype. The
    differences: any device and any strides.

    Args:
        prefix: running sum of the open block, ``[T, H]``; written when there is a ``delta``.
        delta: output of the last sublayer, ``[T, H]``, or None.
        blocks: bank of blocks, ``[T, NB, H]``; slot ``block_write_idx`` is written.
        norm_weight: gain of the key RMSNorm, ``[H]``.
        qk_weight: pseudo-query, ``[H]``.
        output_norm_weight: gain of the RMSNorm that follows, ``[H]``, or None.
        num_blocks: how many slots are attended.
        block_write_idx: slot that the updated prefix is stored in before anything is attended;
            negative for none.
        eps: epsilon of the key norm.
        output_norm_eps: epsilon of the norm that follows.

    Returns:
        The hidden state ``[T, H]`` in the prefix's dtype. Nothing is recorded for autograd.

    Raises:
        RuntimeError: a shape or an index that does not fit; nothing was written then.
    """
    _check(
        prefix,
        delta,
        blocks,
        norm_weight,
        qk_weight,
        output_norm_weight,
        num_blocks,
        block_write_idx,
    )
    if delta is not None:
        prefix.add_(delta)
    if block_write_idx >= 0:
        blocks[:, block_write_idx].copy_(prefix)
    hidden = ops.depth_attention(
        [*blocks[:, :num_blocks].unbind(1), prefix],
        qk_weight,
        norm_weight,
        out_weight=output_norm_weight,
        eps=eps,
        out_eps=output_norm_eps,
    )
    return hidden.to(prefix.dtype)


def _check(
    prefix: Tensor,
    delta: Tensor | None,
    blocks: Tensor,
    norm_weight: Tensor,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    num_blocks: int,
    block_write_idx: int,
) -> None:
    """Everything that must be known to fit before the first write."""
    if prefix.dim() != 2:
        raise RuntimeError(
            f"attn_res: prefix has shape {list(prefix.shape)}, expected [tokens, hidden]"
        )
    tokens, hidden = prefix.shape
    if not prefix.is_floating_point():
        raise RuntimeError(
            f"attn_res: prefix has dtype {prefix.dtype}, expected a floating-point one"
        )
    if blocks.dim() != 3 or (blocks.shape[0], blocks.shape[2]) != (tokens, hidden):
        raise RuntimeError(
            f"attn_res: blocks has shape {list(blocks.shape)}, "
            f"expected [{tokens}, slots, {hidden}] for a prefix of shape {list(prefix.shape)}"
        )
    wanted = {
        "delta": (delta, [tokens, hidden]),
        "norm_weight": (norm_weight, [hidden]),
        "qk_weight": (qk_weight, [hidden]),
        "output_norm_weight": (output_norm_weight, [hidden]),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise RuntimeError(f"attn_res: {name} has shape {list(tensor.shape)}, expected {shape}")
    named = {"blocks": blocks, **{name: tensor for name, (tensor, _) in wanted.items()}}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise RuntimeError(
                f"attn_res: {name} has dtype {tensor.dtype}, expected a floating-point one"
            )
        if tensor.device != prefix.device:
            raise RuntimeError(
                f"attn_res: {name} is on {tensor.device}, expected {prefix.device} like prefix"
            )
    slots = blocks.shape[1]
    if not 0 <= num_blocks <= slots:
        raise RuntimeError(
            f"attn_res: num_blocks is {num_blocks}, expected 0 to {slots}, the slots of blocks"
        )
    if block_write_idx >= slots:
        raise RuntimeError(
            f"attn_res: block_write_idx is {block_write_idx}, expected less than {slots}, "
            "the slots of blocks"
        )
