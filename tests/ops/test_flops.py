"""``FlopCounterMode`` counts every operator as it counts the definition's matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from attnres_ext import AttentionResiduals, BlockCache, ops
from tests.ops.cases import make_sources, make_weights

N, S, D, TOKENS = 5, 3, 24, (2, 7)
M = 14


def counted(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def mixed(sources: list[Tensor], queries: Tensor, rows: Tensor | None = None) -> Tensor:
    """Depth attention as matrix products: scores of keys, and a weighted sum of values.

    ``rows`` ``[S, M, D]`` and a score for each stand for what is merged.
    """
    values = torch.stack([source.flatten(0, -2) for source in sources])  # [N, M, D]
    keys = torch.nn.functional.normalize(values, dim=-1)
    scores = keys @ queries.mT  # [N, M, S]
    if rows is not None:
        values = torch.cat([values, rows])
        scores = torch.cat([scores, torch.zeros_like(scores)])
    weights = scores.softmax(0).permute(1, 2, 0)  # [M, S, N]
    return weights @ values.transpose(0, 1)  # [M, S, D]


def learnt(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def inputs() -> tuple[list[Tensor], Tensor, Tensor]:
    sources = learnt(make_sources(N, (*TOKENS, D)))
    weights = make_weights(D)
    return sources, weights["query"].requires_grad_(), torch.randn(S, D, requires_grad=True)


def sum_of(result: Any) -> Tensor:
    return sum(part.sum() for part in (result if isinstance(result, tuple) else (result,)))


def depth(sources: list[Tensor], query: Tensor, queries: Tensor) -> Any:
    return ops.depth_attention(sources, query)


def accumulate(sources: list[Tensor], query: Tensor, queries: Tensor) -> Any:
    return ops.accumulate_depth_attention(sources[-1], sources[0], sources[:-1], query)


def first_of_a_block(sources: list[Tensor], query: Tensor, queries: Tensor) -> Any:
    return ops.accumulate_depth_attention(None, sources[0], sources[1:], query)


def inter(sources: list[Tensor], query: Tensor, queries: Tensor) -> Any:
    return ops.inter_block_attention(sources, queries)


def merge(sources: list[Tensor], query: Tensor, queries: Tensor) -> Any:
    lse = torch.zeros(TOKENS, requires_grad=True)
    return ops.merge_partial(sources[0], lse, sources[1], sources[2], query)


def plain_depth(sources: list[Tensor], query: Tensor, queries: Tensor) -> Tensor:
    return mixed(sources, query[None])


def plain_inter(sources: list[Tensor], query: Tensor, queries: Tensor) -> Tensor:
    return mixed(sources, queries)


def plain_merge(sources: list[Tensor], query: Tensor, queries: Tensor) -> Tensor:
    return mixed(sources[:1], query[None], sources[1].flatten(0, -2)[None])


@pytest.mark.parametrize(
    ("operator", "plain"),
    [
        (depth, plain_depth),
        (accumulate, plain_depth),
        (first_of_a_block, plain_depth),
        (inter, plain_inter),
        (merge, plain_merge),
    ],
)
@pytest.mark.parametrize("frozen", ["nothing", "query", "a source"])
def test_counts_are_those_of_matrix_products(operator: Any, plain: Any, frozen: str) -> None:
    sources, query, queries = inputs()
    if frozen == "query":
        query, queries = query.detach(), queries.detach()
    if frozen == "a source" and operator is not merge:
        sources[1] = sources[1].detach()
    forward = counted(lambda: operator(sources, query, queries))
    assert forward == counted(lambda: plain(sources, query, queries))
    both = counted(lambda: sum_of(operator(sources, query, queries)).backward())
    expected = counted(lambda: plain(sources, query, queries).sum().backward())
    if frozen == "a source" and operator is not merge:
        # A stack's gradient is whole, whatever is needed of it.
        expected -= 4 * M * D * (S if operator is inter else 1)
    assert both == expected > forward > 0


def test_every_operator_has_a_formula() -> None:
    facts = {"cpu_instruction_set", "cuda_architectures", "source_hash"}
    for schema in torch._C._jit_get_all_schemas():
        space, name = schema.name.split("::")
        if space == "attnres" and name not in facts:
            assert getattr(torch.ops.attnres, name) in flop_registry, name


def test_a_block_cache_counts_its_filled_slots() -> None:
    cache = BlockCache(capacity=4, shape=TOKENS, hidden_size=D)
    weights = make_weights(D)

    def step() -> None:
        cache.write(torch.randn(*TOKENS, D))
        cache.close()
        cache.attend(torch.randn(*TOKENS, D), weights["query"])  # two slots
        cache.close()
        cache.inter(torch.randn(S, D))  # two blocks
        cache.merge(0, torch.randn(*TOKENS, D), weights["query"])

    assert counted(step) == M * D * (4 * 2 + 4 * 2 * S + 6)


@pytest.mark.parametrize("two_phase", [False, True])
def test_a_model_is_counted_by_site(two_phase: bool) -> None:
    residual = AttentionResiduals(D, 6, sublayers_per_block=3, two_phase=two_phase)

    def forward() -> Tensor:
        state = residual.start(torch.randn(M, D, requires_grad=True))
        for site in range(6):
            state.write(torch.tanh(state.read(site)))
        return state.read_output()

    sources = sum(len(residual.sources_at(site)) for site in range(7))
    if two_phase:  # site 0 is alone; then blocks of 3 sites, over 1 and over 2 blocks
        expected = 4 * M * D + 2 * 3 * 6 * M * D + 3 * 4 * M * D * (1 + 2)
    else:
        expected = 4 * M * D * sources
    assert counted(forward) == expected
    assert counted(lambda: forward().sum().backward()) == 3 * expected
