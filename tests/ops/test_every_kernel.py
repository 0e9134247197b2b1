"""Every kernel by every way in which it is launched: what compute-sanitizer runs, too, at its
pace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnres_ext import AttentionResiduals
from tests.helpers import assert_same_bits, check
from tests.ops.cases import make_sources, make_weights
from tests.ops.ways import DEPTH, PHASE_ONE, Way

pytestmark = pytest.mark.sanitizer


def depth_attention(module: Any, **arguments: Any) -> Any:
    return module.depth_attention(**arguments)


def accumulate(module: Any, sources: Any, **arguments: Any) -> Any:
    partial, delta, *blocks = sources
    return module.accumulate_depth_attention(partial, delta, blocks, **arguments)


def inter_block(module: Any, sources: Any, **arguments: Any) -> Any:
    return module.inter_block_attention(sources, **arguments)


def merge(module: Any, sources: Any, **arguments: Any) -> Any:
    partial, delta, out, other = sources
    lse = other[..., 0].to(torch.promote_types(other.dtype, torch.float32))
    return module.merge_partial(out, lse, partial, delta, **arguments)


def rows_of(way: Way, device: str, extra: int = 0) -> list[torch.Tensor]:
    """Sources of a way, and so many more of the first dtype, before them."""
    shape = (way.tokens_on(device), way.hidden)
    first = make_sources(extra, shape, dtype=way.dtypes[0], device=device)
    return [*first, *make_sources(way.sources, shape, dtype=way.dtypes, device=device)]


def frozen(arguments: dict[str, Any], backward: bool) -> list[str]:
    """Everything, where only the forward is to run."""
    names = [*arguments, *(f"sources[{i}]" for i in range(len(arguments["sources"])))]
    return [] if backward else names


@pytest.fixture(autouse=True)
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body that the way is about."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and "way" in callspec.params:
        monkeypatch.setenv("ATTNRES_CUDA_CONFIG", callspec.params["way"].config)


directions = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
ways = pytest.mark.parametrize("way", DEPTH, ids=lambda way: way.name)


@directions
@ways
def test_depth_attention(device: str, way: Way, backward: bool) -> None:
    arguments = {"sources": rows_of(way, device), **make_weights(way.hidden, device=device)}
    # Logits of a few units, whatever the width.
    arguments["scale"] = min(1.0, 8 / way.hidden**0.5)
    check(depth_attention, arguments, frozen=frozen(arguments, backward))


@directions
@ways
def test_depth_attention_with_summation(device: str, way: Way, backward: bool) -> None:
    """Partial sum and delta, then the sources as blocks."""
    blocks = rows_of(way, device, extra=2)
    arguments = {"sources": blocks, **make_weights(way.hidden, device=device)}
    arguments["scale"] = min(1.0, 8 / way.hidden**0.5)
    check(accumulate, arguments, frozen=frozen(arguments, backward))


@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [256, 67, 7168])
def test_depth_attention_with_merge(
    device: str, hidden: int, dtype: torch.dtype, backward: bool
) -> None:
    sources = make_sources(4, (5, hidden), dtype=dtype, device=device)
    arguments = {"sources": sources, **make_weights(hidden, device=device)}
    arguments["scale"] = min(1.0, 8 / hidden**0.5)
    check(merge, arguments, frozen=frozen(arguments, backward))


@directions
@pytest.mark.parametrize("way", PHASE_ONE, ids=lambda way: way.name)
def test_inter_block_attention(device: str, way: Way, backward: bool) -> None:
    arguments = {
        "sources": rows_of(way, device),
        "queries": 0.5 * torch.randn(way.queries, way.hidden, device=device),
        "key_weights": 1 + 0.2 * torch.randn(way.queries, way.hidden, device=device),
        "scale": min(1.0, 8 / way.hidden**0.5),
    }
    tokens = way.tokens_on(device)
    check(inter_block, arguments, frozen=frozen(arguments, backward), tokens=tokens)


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
