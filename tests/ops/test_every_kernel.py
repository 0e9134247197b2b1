"""Every kernel once, on few tokens: what compute-sanitizer runs, too, at its pace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnres_ext import AttentionResiduals
from tests.helpers import assert_same_bits, check
from tests.ops.cases import make_sources, make_weights

pytestmark = pytest.mark.sanitizer

#: Rows that are loaded 16 bytes at a time, and rows that are not.
HIDDEN_SIZES = [256, 67]


def depth_attention(module: Any, **arguments: Any) -> Any:
    return module.depth_attention(**arguments)


def accumulate(module: Any, sources: Any, **arguments: Any) -> Any:
    partial, delta, *blocks = sources
    return module.accumulate_depth_attention(partial, delta, blocks, **arguments)


def inter_block(module: Any, sources: Any, query: Any, key_weight: Any, **_: Any) -> Any:
    queries = torch.stack([query, -query, 2 * query])
    return module.inter_block_attention(sources, queries, key_weight.expand(3, -1))


def merge(module: Any, sources: Any, **arguments: Any) -> Any:
    partial, delta, out, other = sources
    lse = other[..., 0].to(torch.promote_types(other.dtype, torch.float32))
    return module.merge_partial(out, lse, partial, delta, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
@pytest.mark.parametrize("operator", [depth_attention, accumulate, inter_block, merge])
def test_operators(device: str, operator: Any, hidden: int, dtype: torch.dtype) -> None:
    sources = make_sources(4, (5, hidden), dtype=dtype, device=device)
    tokens = 5 if operator is inter_block else None
    check(operator, {"sources": sources, **make_weights(hidden, device=device)}, tokens=tokens)


@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
def test_many_sources(device: str, hidden: int) -> None:
    sources = make_sources(40, (3, hidden), dtype=torch.bfloat16, device=device)
    check(depth_attention, {"sources": sources, **make_weights(hidden, device=device)})


@pytest.mark.parametrize("two_phase", [False, True], ids=["single-pass", "two-phase"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module(device: str, dtype: torch.dtype, two_phase: bool) -> None:
    """Gradients gathered in the kernels, forward and backward, and the cache's reads and writes."""
    hidden, sublayers = 64, 5
    residual = AttentionResiduals(
        hidden, sublayers, sublayers_per_block=2, two_phase=two_phase, device=device
    )
    for query in residual.queries:
        torch.nn.init.normal_(query, std=0.1)
    norm = torch.rand(hidden, device=device) + 0.5
    embedding = torch.randn(4, hidden, device=device).to(dtype)

    def stack(cache: Any = None) -> torch.Tensor:
        state = residual.start(embedding, cache)
        for site in range(sublayers):
            state.write(torch.tanh(state.read(site, norm)))
        return state.read_output(norm)

    embedding.requires_grad_()
    gradients = [
        torch.autograd.grad(stack().sum(), [embedding, *residual.parameters()]) for _ in range(2)
    ]
    for first, second in zip(*gradients, strict=True):
        assert bool(first.isfinite().all())
        assert_same_bits("gradient", first, second)
    embedding.requires_grad_(False)
    with torch.inference_mode():
        cached = stack(residual.new_cache(4, dtype=dtype, device=device))
        torch.testing.assert_close(cached, stack(), rtol=2e-2, atol=2e-2)
