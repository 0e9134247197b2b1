"""Inputs that operators must take: dtypes, hidden sizes, and rows laid out in every legal way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
#: Hidden sizes around the widths of vectors (odd, prime, one short of a vector) and one real one.
HIDDEN_SIZES = [1, 3, 7, 17, 63, 100, 2304]


def contiguous(shape: Sequence[int], **kwargs: object) -> Tensor:
    return torch.randn(tuple(shape), **kwargs)


def padded_rows(shape: Sequence[int], **kwargs: object) -> Tensor:
    """Rows of a wider tensor: the row stride exceeds D."""
    return torch.randn((*shape[:-1], shape[-1] + 5), **kwargs)[..., : shape[-1]]


def unaligned(shape: Sequence[int], **kwargs: object) -> Tensor:
    """Dense, one element past the start of its storage."""
    size = 1
    for s in shape:
        size *= s
    return torch.randn(size + 1, **kwargs)[1:].view(tuple(shape))


def sliced_tokens(shape: Sequence[int], **kwargs: object) -> Tensor:
    """A slice over the tokens of a longer tensor: leading dimensions cannot be flattened."""
    if len(shape) < 2:
        return contiguous(shape, **kwargs)
    longer = torch.randn((*shape[:-2], shape[-2] + 3, shape[-1]), **kwargs)
    return longer[..., 1 : 1 + shape[-2], :]


def transposed(shape: Sequence[int], **kwargs: object) -> Tensor:
    """Leading dimensions stored in reverse order (``[T, B, D]`` seen as ``[B, T, D]``)."""
    lead = len(shape) - 1
    stored = torch.randn((*reversed(shape[:-1]), shape[-1]), **kwargs)
    return stored.permute(*reversed(range(lead)), lead)


def strided_inside(shape: Sequence[int], **kwargs: object) -> Tensor:
    """Every second element of a row: the inner stride is 2."""
    return torch.randn((*shape[:-1], 2 * shape[-1]), **kwargs)[..., ::2]


def expanded(shape: Sequence[int], **kwargs: object) -> Tensor:
    """One row seen as many: leading strides are 0."""
    return torch.randn(shape[-1], **kwargs).expand(tuple(shape))


LAYOUTS = {
    f.__name__: f
    for f in (
        contiguous,
        padded_rows,
        unaligned,
        sliced_tokens,
        transposed,
        strided_inside,
        expanded,
    )
}


def make_sources(
    count: int,
    shape: Sequence[int] = (2, 5, 17),
    *,
    dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
    layout: str | Sequence[str] = "contiguous",
    device: str = "cpu",
    spread: float = 1.0,
) -> list[Tensor]:
    """``count`` sources of ``shape``; sequences of dtypes and layouts are repeated cyclically.

    ``spread`` > 1 makes sources differ in size, as the outputs of layers of different depth do.
    """
    dtypes = [dtype] if isinstance(dtype, torch.dtype) else list(dtype)
    layouts = [layout] if isinstance(layout, str) else list(layout)
    sources = []
    for i in range(count):
        values = LAYOUTS[layouts[i % len(layouts)]](
            shape, dtype=dtypes[i % len(dtypes)], device=device
        )
        sources.append(values if spread == 1.0 else values.mul_(spread ** (i % 4)))
    return sources


def make_vector(
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    around: float = 0.0,
    by: float = 0.5,
) -> Tensor:
    """A weight: queries spread around 0, gains around 1."""
    return (around + by * torch.randn(size, device=device)).to(dtype)


def make_weights(
    size: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", norm: bool = True
) -> dict[str, Tensor]:
    """``query``, ``key_weight`` and (with ``norm``) ``out_weight``."""
    weights = {
        "query": make_vector(size, dtype=dtype, device=device),
        "key_weight": make_vector(size, dtype=dtype, device=device, around=1.0, by=0.2),
    }
    if norm:
        weights["out_weight"] = make_vector(size, dtype=dtype, device=device, around=1.0, by=0.2)
    return weights
