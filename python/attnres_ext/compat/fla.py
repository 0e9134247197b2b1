"""``fused_attnres`` as in flash-linear-attention (``fla.ops.attnres``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnres_ext import ops

__all__ = ["fused_attnres"]

# Level 0 keeps the mixed output for backward, level 1 computes it again from the sources.
_SAVE = {0: "output", 1: "stats"}


def fused_attnres(
    query: Tensor,
    residuals: Tensor | Sequence[Tensor],
    rms_weight: Tensor,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
    return_weights: bool = False,
    checkpoint_level: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over depth (paper, Eq. 2-4), called as flash-linear-attention calls it.

    Everything is computed in float32 and rounded once, to the dtype of the output. The differences:
    any device, strided and unaligned sources are read where they are, sources of mixed dtype are
    promoted, and float64 is computed in float64.

    Args:
        query: pseudo-query, ``[D]``, ``[1, D]`` or ``[D, 1]``.
        residuals: the sources, a sequence of tensors ``[..., D]`` or one stacked tensor ``[L, ...,
            D]``.
        rms_weight: gain of the key RMSNorm, ``[D]``.
        output_rms_weight: gain of an RMSNorm applied to the mix, ``[D]``; None for none.
        rms_eps: epsilon of both norms.
        scale: factor on the logits.
        return_weights: also return the softmax weights.
        checkpoint_level: 0 keeps the mix for backward, 1 computes it again. Gradients are the same.

    Returns:
        The output ``[..., D]``, and with ``return_weights`` the weights ``[L, ...]`` in float32. As
        in flash-linear-attention the weights carry no gradient; ``attnres_ext.depth_attention``
        returns weights that do.

    Raises:
        RuntimeError: no sources, or an unknown ``checkpoint_level``.
    """
    if checkpoint_level not in _SAVE:
        raise RuntimeError(
            f"fused_attnres: checkpoint_level is {checkpoint_level}, expected 0 or 1"
        )
    sources = list(residuals.unbind(0) if isinstance(residuals, Tensor) else residuals)
    if not sources:
        raise RuntimeError("fused_attnres: residuals is empty, expected at least one source")
    shape = sources[0].shape
    for i, source in enumerate(sources):
        if source.shape == shape:
            continue
        # flash-linear-attention flattens every source by itself, so [B, T, D] may meet [B * T, D].
        if source.numel() != sources[0].numel() or source.shape[-1:] != shape[-1:]:
            raise RuntimeError(
                f"fused_attnres: residuals[{i}] has shape {list(source.shape)}, "
                f"expected {list(shape)} or the same rows with other leading dimensions"
            )
        sources[i] = source.reshape(shape)
    result = ops.depth_attention(
        sources,
        query,
        rms_weight.reshape(-1),
        out_weight=None if output_rms_weight is None else output_rms_weight.reshape(-1),
        eps=rms_eps,
        scale=scale,
        return_weights=return_weights,
        save=_SAVE[checkpoint_level],
    )
    if return_weights:
        out, weights = result
        return out, weights.detach()
    return result
