"""Any legal call agrees with its definition: shapes, layouts, dtypes and duplicates at random."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import check
from tests.ops import test_accumulate_depth_attention as accumulating
from tests.ops import test_merge_partial as merging
from tests.ops.cases import DTYPES, LAYOUTS, make_vector

SHAPES = st.tuples(
    st.lists(st.integers(0, 4), max_size=3), st.one_of(st.integers(1, 20), st.integers(21, 150))
).map(lambda lead_and_hidden: (*lead_and_hidden[0], lead_and_hidden[1]))
SCALES = st.sampled_from([1.0, 0.1, -1.5])
EPSILONS = st.sampled_from([1e-6, 1e-5, 1e-2])
SAVES = st.sampled_from(["nothing", "stats", "output"])


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], count: int, one_dtype: bool = False) -> list[Tensor]:
    """``count`` tensors of a shape, each of its own layout and dtype, some the same object."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    made: list[Tensor] = []
    for _ in range(count):
        if made and draw(st.integers(0, 5)) == 0:
            made.append(draw(st.sampled_from(made)))
            continue
        layout = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
        kind = dtype if one_dtype or draw(st.booleans()) else draw(st.sampled_from(DTYPES))
        made.append(layout(shape, dtype=kind))
    return made


@st.composite
def weights(draw: Any, hidden: int, norm: bool = True) -> dict[str, Any]:
    dtype = st.sampled_from(DTYPES)
    shape = draw(st.sampled_from([(hidden,), (1, hidden), (hidden, 1)]))
    drawn: dict[str, Any] = {"query": make_vector(hidden, dtype=draw(dtype)).reshape(shape)}
    if draw(st.booleans()):
        drawn["key_weight"] = make_vector(hidden, dtype=draw(dtype), around=1.0, by=0.2)
    if norm and draw(st.booleans()):
        drawn["out_weight"] = make_vector(hidden, dtype=draw(dtype), around=1.0, by=0.2)
        drawn["out_eps"] = draw(st.one_of(st.none(), EPSILONS))
    return {**drawn, "eps": draw(EPSILONS), "scale": draw(SCALES)}


@st.composite
def frozen(draw: Any, names: list[str]) -> list[str]:
    """Some arguments require no gradient."""
    return draw(st.lists(st.sampled_from(names), max_size=len(names) - 1, unique=True))


def distinct(tensors: list[Tensor], name: str) -> list[str]:
    """Names of the elements that appear once."""
    return [f"{name}[{i}]" for i, t in enumerate(tensors) if sum(t is u for u in tensors) == 1]


@settings(max_examples=120)
@given(st.data())
def test_depth_attention(data: Any) -> None:
    shape = data.draw(SHAPES)
    sources = data.draw(tensors(shape, data.draw(st.integers(1, 7))))
    arguments = {"sources": sources, **data.draw(weights(shape[-1])), "save": data.draw(SAVES)}
    arguments["return_weights"] = data.draw(st.booleans())

    def call(module: Any, sources: Any, query: Any, key_weight: Any = None, **o: Any) -> Any:
        return module.depth_attention(sources, query, key_weight, **o)

    rows = max(sources[0].numel() // shape[-1], 1)
    check(
        call,
        arguments,
        frozen=data.draw(frozen(["query", *distinct(sources, "sources")])),
        tokens=rows,
    )


@settings(max_examples=80)
@given(st.data())
def test_accumulate_depth_attention(data: Any) -> None:
    shape = data.draw(SHAPES)
    partial, delta, *blocks = data.draw(tensors(shape, data.draw(st.integers(2, 7))))
    arguments = {
        "partial": partial,
        "delta": delta,
        "blocks": blocks,
        **data.draw(weights(shape[-1])),
    }

    check(
        accumulating.accumulate,
        arguments,
        exact=accumulating.exactly,
        tokens=max(delta.numel() // shape[-1], 1),
    )


@settings(max_examples=60)
@given(st.data())
def test_inter_block_attention(data: Any) -> None:
    shape = data.draw(SHAPES)
    blocks = data.draw(tensors(shape, data.draw(st.integers(1, 6))))
    count = data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from(DTYPES))
    queries = (0.5 * torch.randn(count, shape[-1])).to(dtype)
    gains = (
        (1 + 0.2 * torch.randn(count, shape[-1])).to(dtype) if data.draw(st.booleans()) else None
    )
    arguments = {"blocks": blocks, "queries": queries, "key_weights": gains}

    def call(module: Any, **arguments: Any) -> Any:
        return module.inter_block_attention(**arguments)

    options = {"eps": data.draw(EPSILONS), "scale": data.draw(SCALES)}
    check(call, {**arguments, **options}, tokens=max(blocks[0].numel() // shape[-1], 1))


@settings(max_examples=80)
@given(st.data())
def test_merge_partial(data: Any) -> None:
    shape = data.draw(SHAPES)
    out, partial, delta = data.draw(tensors(shape, 3))
    lse = 2 * torch.randn(shape[:-1])
    arguments = {
        "out": out,
        "lse": lse,
        "partial": partial,
        "delta": delta,
        **data.draw(weights(shape[-1])),
    }

    check(merging.merge, arguments, exact=merging.exactly, tokens=max(out.numel() // shape[-1], 1))


@settings(max_examples=40)
@given(st.data())
def test_two_phases_are_one_pass(data: Any) -> None:
    """However many blocks and queries: phase 1 and phase 2 together are the single pass."""
    shape = data.draw(SHAPES)
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    count = data.draw(st.integers(1, 5))
    partial, delta, *blocks = [torch.randn(shape, dtype=torch.float64) for _ in range(count + 2)]
    arguments = {"partial": partial, "delta": delta, "blocks": blocks}
    arguments["query"] = torch.randn(shape[-1], dtype=torch.float64)

    def two_phases(module: Any, partial: Any, delta: Any, blocks: Any, query: Any) -> Any:
        out, lse = module.inter_block_attention(blocks, query[None])
        return module.merge_partial(out[0], lse[0], partial, delta, query)

    def one_pass(module: Any, partial: Any, delta: Any, blocks: Any, query: Any) -> Any:
        return module.accumulate_depth_attention(partial, delta, blocks, query)

    rows = max(partial.numel() // shape[-1], 1)
    check(two_phases, arguments, exact=lambda arguments: one_pass, tokens=rows)
