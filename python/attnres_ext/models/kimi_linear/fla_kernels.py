"""The gated delta rule in flash-linear-attention's kernels, where they are installed.

The same map as in ``delta_rule.py``, with the arguments of that file; made for CUDA, and rounded to
the dtype of the values inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["delta_rule", "takes"]

_LARGEST_HEAD = 256


class _Kernels(NamedTuple):
    chunk: Callable
    recurrent: Callable


@cache
def _kernels() -> _Kernels | None:
    """None where the package is not installed; one that is, but does not load, says why."""
    try:
        from fla.ops import kda
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("fla"):
            raise
        return None
    return _Kernels(kda.chunk_kda, kda.fused_recurrent_kda)


def takes(values: Tensor) -> bool:
    """Whether the kernels are there, for values ``[B, T, H, V]`` of this device, dtype and size.

    They multiply float32 in TF32, 10 bits: only for who lets PyTorch's products do that.
    """
    fits = values.is_cuda and values.shape[-1] <= _LARGEST_HEAD
    return fits and _multiplies(values.dtype) and _kernels() is not None


def _multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return dtype in (torch.bfloat16, torch.float16)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    few_tokens: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, T, H, V]`` and the state after the last token; see ``delta_rule.py``.

    Args:
        q: Queries ``[B, T, H, K]``, normalised.
        k: Keys ``[B, T, H, K]``, normalised.
        v: Values ``[B, T, H, V]``, whose dtype products are computed in.
        g: Log-decay ``[B, T, H, K]``, float32.
        beta: Writing strength ``[B, T, H]``.
        state: State before the first token ``[B, H, K, V]``, float32; None is zeros.
        cu_seqlens: Where the sequences of a packed row begin; each begins without a state.
        few_tokens: Token by token, without gradients: what a decoder runs.
    """
    kernels = _kernels()
    assert kernels is not None
    kernel = kernels.recurrent if few_tokens else kernels.chunk
    return kernel(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        g.float(),
        beta.to(v.dtype),
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
