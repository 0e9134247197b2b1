"""``inter_block_attention`` (phase 1): many queries against the finished blocks in one sweep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnres_ext import ops
from tests.helpers import assert_same_bits, check, evaluate
from tests.ops.cases import DTYPES, HIDDEN_SIZES, LAYOUTS, make_sources


def inter_block(
    module: Any, blocks: Any, queries: Any, key_weights: Any = None, **options: Any
) -> Any:
    return module.inter_block_attention(blocks, queries, key_weights, **options)


def make_queries(
    count: int, hidden: int, device: str, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    return {
        "queries": (0.5 * torch.randn(count, hidden, device=device)).to(dtype),
        "key_weights": (1 + 0.2 * torch.randn(count, hidden, device=device)).to(dtype),
    }


def check_inter_block(blocks: Any, queries: Any, key_weights: Any = None, **options: Any) -> Any:
    rows = blocks[0].numel() // blocks[0].shape[-1]
    arguments = {"blocks": blocks, "queries": queries, "key_weights": key_weights}
    return check(inter_block, {**arguments, **options}, tokens=rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
def test_matches_definition(device: str, dtype: torch.dtype, hidden: int) -> None:
    blocks = make_sources(4, (3, hidden), dtype=dtype, device=device, spread=2.0)
    results = check_inter_block(blocks, **make_queries(3, hidden, device))
    assert results["output 0"].shape == (3, 3, hidden)
    assert results["output 1"].shape == (3, 3)
    assert results["output 1"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 24, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_queries(device: str, dtype: torch.dtype, count: int) -> None:
    blocks = make_sources(3, (2, 2, 40), dtype=dtype, device=device)
    check_inter_block(blocks, **make_queries(count, 40, device))


@pytest.mark.parametrize("count", [1, 2, 9, 256])
def test_number_of_blocks(device: str, count: int) -> None:
    blocks = make_sources(count, (3, 24), device=device)
    results = check_inter_block(blocks, **make_queries(4, 24, device))
    if count == 1:
        assert_same_bits("output", results["output 0"], blocks[0].expand(4, 3, 24))


@pytest.mark.large
@pytest.mark.parametrize(
    ("count", "queries", "hidden"), [(9, 6, 2304), (8, 16, 4096), (8, 24, 7168)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_of_models(
    device: str, dtype: torch.dtype, count: int, queries: int, hidden: int
) -> None:
    """Kimi Linear 48B, the paper's, Kimi K3: more than one CTA of a GPU has room for."""
    blocks = make_sources(count, (5, hidden), dtype=dtype, device=device)
    arguments = make_queries(queries, hidden, device)
    check_inter_block(blocks, **arguments, scale=hidden**-0.5)


@pytest.mark.parametrize("layout", [*LAYOUTS, "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    layouts = list(LAYOUTS) if layout == "mixed" else layout
    blocks = make_sources(4, (2, 4, 40), dtype=dtype, layout=layouts, device=device)
    check_inter_block(blocks, **make_queries(3, 40, device))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float64),
    ],
)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(
    device: str, dtypes: tuple[torch.dtype, ...], weight_dtype: torch.dtype
) -> None:
    blocks = make_sources(4, (3, 33), dtype=dtypes, device=device)
    check_inter_block(blocks, **make_queries(3, 33, device, weight_dtype))


def test_strided_queries(device: str) -> None:
    """Queries may be a slice of a bigger table, transposed, or one row for all."""
    blocks = make_sources(3, (4, 24), device=device)
    for queries in (
        torch.randn(9, 30)[2:5, 3:27],
        torch.randn(24, 3).t(),
        torch.randn(24).expand(3, 24),
    ):
        check_inter_block(blocks, queries.to(device), queries.flip(0).to(device))


def test_key_weights_none_is_ones(device: str) -> None:
    blocks = make_sources(3, (4, 33), dtype=torch.bfloat16, device=device)
    queries = torch.randn(3, 33, device=device)
    none = check_inter_block(blocks, queries)
    ones, _ = evaluate(
        inter_block,
        ops,
        {"blocks": blocks, "queries": queries, "key_weights": torch.ones(3, 33, device=device)},
    )
    for name, value in none.items():
        assert_same_bits(name, value, ones[name])


@pytest.mark.parametrize("scale", [0.125, -2.0])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_scale_and_eps(device: str, scale: float, eps: float) -> None:
    check_inter_block(
        make_sources(3, (4, 24), device=device), **make_queries(3, 24, device), scale=scale, eps=eps
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_query_is_a_depth_attention(device: str, dtype: torch.dtype) -> None:
    blocks = make_sources(5, (3, 40), dtype=dtype, device=device)
    arguments = make_queries(4, 40, device)
    out, lse = ops.inter_block_attention(blocks, **arguments)
    eps = torch.finfo(dtype).eps
    for s in range(4):
        one = ops.depth_attention(blocks, arguments["queries"][s], arguments["key_weights"][s])
        torch.testing.assert_close(out[s], one, rtol=8 * eps, atol=8 * eps)
    assert lse.isfinite().all()


def test_a_query_does_not_see_the_others(device: str) -> None:
    """Bits of a query's output do not depend on how many queries share the sweep."""
    blocks = make_sources(5, (3, 40), dtype=torch.bfloat16, device=device)
    arguments = make_queries(7, 40, device)
    out, lse = ops.inter_block_attention(blocks, **arguments)
    for s in range(7):
        one, one_lse = ops.inter_block_attention(
            blocks, arguments["queries"][s : s + 1], arguments["key_weights"][s : s + 1]
        )
        assert_same_bits("output", out[s], one[0])
        assert_same_bits("lse", lse[s], one_lse[0])


@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_output_used(device: str, used: str) -> None:
    def one(module: Any, **arguments: Any) -> Any:
        return inter_block(module, **arguments)[0 if used == "out" else 1]

    blocks = make_sources(4, (3, 40), device=device)
    check(one, {"blocks": blocks, **make_queries(3, 40, device)}, tokens=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_block_twice(device: str, dtype: torch.dtype) -> None:
    a, b = make_sources(2, (4, 40), dtype=dtype, device=device)
    check_inter_block([a, b, a, a], **make_queries(3, 40, device))


@pytest.mark.parametrize(
    "frozen",
    [
        ("queries",),
        ("key_weights",),
        ("queries", "key_weights"),
        ("blocks[0]",),
        ("blocks[0]", "blocks[1]", "blocks[2]"),
    ],
)
def test_frozen_inputs(device: str, frozen: tuple[str, ...]) -> None:
    blocks = make_sources(3, (4, 40), device=device)
    arguments = {"blocks": blocks, **make_queries(3, 40, device)}
    every, _ = evaluate(inter_block, ops, arguments)
    some = check(inter_block, arguments, frozen=frozen, tokens=4)
    for name, value in some.items():
        assert_same_bits(name, value, every[name])


@pytest.mark.parametrize("shape", [(0, 17), (2, 0, 17)])
def test_no_tokens(device: str, shape: tuple[int, ...]) -> None:
    results = check_inter_block(
        make_sources(3, shape, device=device), **make_queries(2, 17, device)
    )
    assert results["output 0"].shape == (2, *shape)
    assert results["output 1"].shape == (2, *shape[:-1])
    assert (results["gradient of queries"] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_stay_in_their_row(device: str, bad: float) -> None:
    blocks = make_sources(3, (6, 40), dtype=torch.bfloat16, device=device)
    arguments = {"blocks": blocks, **make_queries(3, 40, device)}
    clean, _ = evaluate(inter_block, ops, arguments)
    blocks[1][3, 11] = bad
    dirty, _ = evaluate(inter_block, ops, arguments)
    others = [0, 1, 2, 4, 5]
    assert not dirty["output 0"][:, 3].isfinite().any()
    for i in range(2):
        assert_same_bits("output", dirty[f"output {i}"][:, others], clean[f"output {i}"][:, others])
    for i in range(3):
        name = f"gradient of blocks[{i}]"
        assert_same_bits(name, dirty[name][others], clean[name][others])


def test_huge_logits(device: str) -> None:
    direction = torch.nn.functional.normalize(torch.randn(64, device=device), dim=0)
    blocks = [
        sign * (direction + 0.1 * torch.randn(5, 64, device=device)) for sign in (1.0, -1.0, 1.0)
    ]
    queries = torch.stack([1250 * direction, -1250 * direction, 0 * direction])
    results = check_inter_block(blocks, queries)
    for value in results.values():
        assert value.isfinite().all()
