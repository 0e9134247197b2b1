"""The ways of tests/ops/ways.py are those that the operators' launches take on an H100."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attnres_ext import depth_attention, inter_block_attention
from tests.ops.cases import make_sources
from tests.ops.ways import DEPTH, MANY_TOKENS, PHASE_ONE, Way

from .device import DEVICES, Launched, Simulator


def check(way: Way, launched: Launched, cluster: int | None) -> None:
    assert launched.uses_slots is not way.in_place
    assert launched.resident is way.resident
    assert max(launched.cluster_size, 1) == (cluster or 1)
    assert launched.starts_early


def check_both(simulator: Simulator, way: Way, out: Tensor, leaves: list[Tensor]) -> None:
    """What was launched for ``out``, and for the gradients of ``leaves``."""
    (forward,) = simulator.launches()
    check(way, forward, way.cluster)
    torch.autograd.grad(out.sum(), leaves)
    backward, weight_gradients = simulator.launches()
    check(way, backward, way.cluster_backward)
    assert weight_gradients.num_spans == 0


def check_tile(simulator: Simulator, way: Way) -> None:
    """What was launched without gradients."""
    (launched,) = simulator.launches()
    check(way, launched, way.cluster)
    assert (launched.warps, launched.columns) == way.tile


def leaf(*shape: int) -> Tensor:
    return (0.1 * torch.randn(shape)).requires_grad_()


@pytest.fixture(autouse=True)
def _h100(simulator: Simulator) -> Iterator[None]:
    with simulator.using(DEVICES["h100"], order="forward"):
        simulator.launches()
        yield


@pytest.mark.parametrize("way", DEPTH, ids=lambda way: way.name)
def test_depth_attention(simulator: Simulator, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRES_CUDA_CONFIG", way.config)
    # One more row than multiprocessors is as many as any number of them. The tile does not ask.
    tokens = MANY_TOKENS if way.tokens > MANY_TOKENS and way.tile is None else 1
    sources = make_sources(way.sources, (tokens, way.hidden), dtype=way.dtypes)
    query = leaf(way.hidden)
    if way.tile is not None:
        with torch.no_grad():
            depth_attention(sources, query)
        return check_tile(simulator, way)
    leaves = [source.requires_grad_() for source in sources]
    check_both(simulator, way, depth_attention(leaves, query), [*leaves, query])


@pytest.mark.parametrize("way", PHASE_ONE, ids=lambda way: way.name)
def test_phase_one(simulator: Simulator, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number of tokens makes no difference."""
    monkeypatch.setenv("ATTNRES_CUDA_CONFIG", way.config)
    sources = make_sources(way.sources, (1, way.hidden), dtype=way.dtypes)
    leaves = [source.requires_grad_() for source in sources]
    queries = leaf(way.queries, way.hidden)
    if way.tile is not None:
        with torch.no_grad():
            inter_block_attention(sources, queries)
        return check_tile(simulator, way)
    out, lse = inter_block_attention(leaves, queries)
    check_both(simulator, way, out.float().sum() + lse.sum(), [*leaves, queries])
