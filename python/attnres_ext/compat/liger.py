"""``liger_attn_res`` as in Liger-Kernel (``liger_kernel.transformers.functional``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnres_ext import ops

__all__ = ["liger_attn_res"]


def liger_attn_res(
    V: Tensor | Sequence[Tensor],  # noqa: N803 (Liger's name, part of the signature)
    w_query: Tensor,
    w_norm: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """Softmax attention over depth (paper, Eq. 2-4), called as Liger-Kernel calls it.

    The mix is computed in float32 and rounded once, to the dtype of the sources; gradients come
    back in the dtype of their inputs. The differences: any device; a list is never stacked; up to
    256 sources; weight gradients are summed in a fixed order; float64 is computed in float64.

    **One rounding is left out.** Liger rounds ``v * rstd`` to the dtype of ``w_norm``, and its
    product with ``w_norm`` again, before it scores. With a float32 ``w_norm`` that does nothing and
    both agree. With a bfloat16 or float16 ``w_norm`` (unit roundoff u = 2^-8 or 2^-11) Liger's
    logits are off by up to ``((1 + u)^2 - 1) * sum |w_query * w_norm * v * rstd|`` from the
    definition's, ours are not; nothing else differs, and Liger's backward does not differentiate
    the rounding either.

    Args:
        V: the sources, ``[N, B, T, D]`` or a list of N tensors ``[B, T, D]``; any leading
            dimensions will do.
        w_query: pseudo-query, ``[D]``.
        w_norm: gain of the key RMSNorm, ``[D]``.
        eps: epsilon of the key RMSNorm.

    Returns:
        The mix, ``[B, T, D]``, in the dtype of the sources.

    Raises:
        ValueError: no sources.
    """
    sources = list(V.unbind(0) if isinstance(V, Tensor) else V)
    if not sources:
        raise ValueError("liger_attn_res: V is empty, expected at least one source")
    return ops.depth_attention(sources, w_query, w_norm, eps=eps)
