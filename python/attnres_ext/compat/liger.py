"""``liger_attn_res`` and ``LigerAttnRes`` as in Liger-Kernel (``liger_kernel.transformers``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnres_ext import ops

__all__ = ["LigerAttnRes", "liger_attn_res"]


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
        RuntimeError: no sources.
    """
    sources = list(V.unbind(0) if isinstance(V, Tensor) else V)
    if not sources:
        raise RuntimeError("liger_attn_res: V is empty, expected at least one source")
    return ops.depth_attention(sources, w_query, w_norm, eps=eps)


class LigerAttnRes(nn.Module):
    """A reading site as a module, made and called as Liger-Kernel's, with its parameters' names.

    Args:
        hidden_size: ``D``.
        eps: Epsilon of the key RMSNorm.
        query_init_std: Standard deviation of the normal distribution that the pseudo-query starts
            from. (Zero, as in the paper, makes a model start from plain averages.)

    Attributes:
        w_query: ``[D]``, the pseudo-query.
        w_norm: ``[D]``, the gain of the key RMSNorm, initially 1.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, query_init_std: float = 0.02) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.query_init_std = hidden_size, eps, query_init_std
        self.w_query = nn.Parameter(torch.empty(hidden_size))
        self.w_norm = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the pseudo-query; a gain of 1."""
        nn.init.normal_(self.w_query, std=self.query_init_std)
        nn.init.ones_(self.w_norm)

    def forward(self, V: Tensor | Sequence[Tensor]) -> Tensor:  # noqa: N803 (Liger's name)
        """The mix ``[B, T, D]`` of ``[N, B, T, D]``, or of a list of N tensors."""
        return liger_attn_res(V, self.w_query, self.w_norm, self.eps)

    def extra_repr(self) -> str:
        """Size and epsilon, for ``print(module)``."""
        return f"hidden_size={self.hidden_size}, eps={self.eps}"
