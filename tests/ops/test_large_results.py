"""Results too large for a CPU's caches are written past them: the same bits, every one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext import accumulate_depth_attention, depth_attention, inter_block_attention
from tests.helpers import assert_same_bits
from tests.ops.cases import make_sources

pytestmark = pytest.mark.large

#: Whole cache lines, but not whole tiles of four vectors.
HIDDEN = 2080
#: Bytes of a result that is written past the caches (``csrc/cpu/rows.hpp``).
STREAMED = 8 * 2**20


def results_and_gradients(operator: Callable[..., Any], sources: list[Tensor]) -> list[Tensor]:
    """[..., tokens, hidden] each: the result and the sources' gradients."""
    leaves = [source.detach().requires_grad_() for source in sources]
    out = operator([*leaves, leaves[0]])  # one gradient is made twice, and added up
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize("operator", ["depth_attention", "accumulate", "inter_block_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_results_equal_small_ones(device: str, dtype: torch.dtype, operator: str) -> None:
    """A token's results depend neither on how many others there are nor on how they are written."""
    queries = 4 if operator == "inter_block_attention" else 1
    vectors = 0.1 * torch.randn(queries, HIDDEN, device=device)

    def call(sources: list[Tensor]) -> Tensor:
        if operator == "accumulate":
            partial, delta, *blocks = sources
            return torch.cat(accumulate_depth_attention(partial, delta, blocks, vectors[0]), dim=-1)
        if operator == "inter_block_attention":
            return inter_block_attention(sources, vectors)[0]
        return depth_attention(sources, vectors[0])

    tokens = -(-STREAMED // (queries * HIDDEN * dtype.itemsize)) + 1
    sources = make_sources(4, (tokens, HIDDEN), dtype=dtype, device=device)
    whole = results_and_gradients(call, sources)
    half = tokens // 2
    parts = [
        results_and_gradients(call, [source[rows].clone() for source in sources])
        for rows in (slice(None, half), slice(half, None))
    ]
    for i, (large, *small) in enumerate(zip(whole, *parts, strict=True)):
        assert_same_bits(f"result {i}", large, torch.cat(small, dim=-2))
