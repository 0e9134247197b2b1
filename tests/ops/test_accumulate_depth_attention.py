"""``accumulate_depth_attention``: block summation and depth attention in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext import ops, reference
from tests.helpers import assert_all_same_bits, assert_same_bits, check, evaluate
from tests.ops.cases import DTYPES, HIDDEN_SIZES, LAYOUTS, make_sources, make_vector, make_weights


def accumulate(
    module: Any,
    partial: Any,
    delta: Any,
    blocks: Any,
    query: Any,
    key_weight: Any = None,
    **options: Any,
) -> Any:
    return module.accumulate_depth_attention(partial, delta, blocks, query, key_weight, **options)


def exactly(arguments: Any) -> Any:
    """The definition in float64 with the one rounding that is part of it: the new partial's."""
    rounded = reference.add_to_partial(arguments["partial"], arguments["delta"]).double()

    def function(
        module: Any,
        partial: Any,
        delta: Any,
        blocks: Any,
        query: Any,
        key_weight: Any = None,
        **o: Any,
    ) -> Any:
        new = reference.add_to_partial(partial, delta)
        new = new + (rounded - new).detach()
        o.pop("save", None)
        return module.depth_attention([*blocks, new], query, key_weight, **o), new

    return function


def check_accumulate(
    partial: Tensor | None,
    delta: Tensor,
    blocks: list[Tensor],
    *,
    frozen: tuple[str, ...] = (),
    **arguments: Any,
) -> dict[str, Tensor | None]:
    results = check(
        accumulate,
        {"partial": partial, "delta": delta, "blocks": blocks, **arguments},
        exact=exactly,
        frozen=frozen,
    )
    # The sum is one addition and one rounding: there is only one right answer.
    assert_same_bits("new partial", results["output 1"], reference.add_to_partial(partial, delta))
    return results


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
def test_matches_definition(device: str, dtype: torch.dtype, hidden: int, norm: bool) -> None:
    partial, delta, *blocks = make_sources(5, (3, hidden), dtype=dtype, device=device, spread=2.0)
    check_accumulate(partial, delta, blocks, **make_weights(hidden, device=device, norm=norm))


@pytest.mark.parametrize("count", [0, 1, 2, 8, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_number_of_blocks(device: str, dtype: torch.dtype, count: int, norm: bool) -> None:
    partial, delta, *blocks = make_sources(count + 2, (2, 3, 24), dtype=dtype, device=device)
    results = check_accumulate(partial, delta, blocks, **make_weights(24, device=device, norm=norm))
    if count == 0:
        assert (results["gradient of query"] == 0).all()
        if not norm:  # the standard residual
            assert_same_bits("hidden", results["output 0"], results["output 1"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    partial, delta, *blocks = make_sources(5, (2, 4, 40), dtype=dtype, layout=layout, device=device)
    check_accumulate(partial, delta, blocks, **make_weights(40, device=device))


def test_mixed_layouts(device: str) -> None:
    partial, delta, *blocks = make_sources(9, (2, 4, 40), layout=list(LAYOUTS), device=device)
    check_accumulate(partial, delta, blocks, **make_weights(40, device=device))


@pytest.mark.parametrize(
    ("partial_dtype", "delta_dtype", "block_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float64),
        (torch.float64, torch.float32, torch.float16),
    ],
)
def test_mixed_dtypes(
    device: str, partial_dtype: torch.dtype, delta_dtype: torch.dtype, block_dtype: torch.dtype
) -> None:
    (partial,) = make_sources(1, (3, 33), dtype=partial_dtype, device=device)
    (delta,) = make_sources(1, (3, 33), dtype=delta_dtype, device=device)
    blocks = make_sources(3, (3, 33), dtype=block_dtype, device=device)
    results = check_accumulate(partial, delta, blocks, **make_weights(33, device=device))
    assert results["output 1"].dtype == partial_dtype
    assert results["output 0"].dtype == torch.promote_types(partial_dtype, block_dtype)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_sublayer_of_a_block(device: str, dtype: torch.dtype, count: int) -> None:
    """Without a partial the delta is the new partial: the same tensor, nothing copied."""
    delta, *blocks = make_sources(count + 1, (3, 24), dtype=dtype, device=device)
    weights = make_weights(24, device=device)
    hidden, new_partial = ops.accumulate_depth_attention(None, delta, blocks, **weights)
    assert new_partial is delta
    assert_same_bits("hidden", hidden, ops.depth_attention([*blocks, delta], **weights))

    def hidden_only(module: Any, **arguments: Any) -> Any:
        return accumulate(module, None, **arguments)[0]

    check(hidden_only, {"delta": delta, "blocks": blocks, **weights})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_sum_is_what_is_scored_and_mixed(device: str, dtype: torch.dtype) -> None:
    """State and use agree bit for bit: the same numbers as adding first and attending then."""
    partial, delta, *blocks = make_sources(6, (5, 100), dtype=dtype, device=device, spread=3.0)
    weights = make_weights(100, device=device)
    hidden, new_partial = ops.accumulate_depth_attention(partial, delta, blocks, **weights)
    assert_same_bits("new partial", new_partial, partial + delta)
    assert_same_bits("hidden", hidden, ops.depth_attention([*blocks, partial + delta], **weights))


def test_inputs_are_not_written(device: str) -> None:
    partial, delta, *blocks = make_sources(5, (3, 24), device=device)
    before = [t.clone() for t in (partial, delta, *blocks)]
    _, new_partial = ops.accumulate_depth_attention(
        partial, delta, blocks, make_vector(24, device=device)
    )
    for b, t in zip(before, (partial, delta, *blocks), strict=True):
        assert_same_bits("input", b, t)
    assert new_partial.data_ptr() not in {partial.data_ptr(), delta.data_ptr()}


@pytest.mark.parametrize("used", ["hidden", "partial"])
@pytest.mark.parametrize("save", ["nothing", "stats", "output"])
def test_one_output_used(device: str, used: str, save: str) -> None:
    """The last sublayer of a model uses the hidden state alone; a sublayer may be skipped."""

    def one(module: Any, **arguments: Any) -> Any:
        return accumulate(module, **arguments)[0 if used == "hidden" else 1]

    partial, delta, *blocks = make_sources(5, (3, 24), device=device)
    arguments = {
        "partial": partial,
        "delta": delta,
        "blocks": blocks,
        **make_weights(24, device=device),
    }
    results, _ = evaluate(one, ops, {**arguments, "save": save})
    plain, _ = evaluate(one, reference, arguments)
    for name, value in plain.items():
        if value is None:  # unused: None or zeros, both mean no gradient
            assert results[name] is None or (results[name] == 0).all()
        else:
            torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-5)


def test_partial_and_delta_share_one_gradient(device: str) -> None:
    partial, delta, *blocks = make_sources(5, (3, 24), dtype=torch.bfloat16, device=device)
    results, _ = evaluate(
        accumulate,
        ops,
        {"partial": partial, "delta": delta, "blocks": blocks, **make_weights(24, device=device)},
    )
    assert_same_bits("gradient", results["gradient of partial"], results["gradient of delta"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_tensor_twice(device: str, dtype: torch.dtype) -> None:
    a, b, c = make_sources(3, (3, 40), dtype=dtype, device=device)
    weights = make_weights(40, device=device)
    check_accumulate(a, a, [b, c], **weights)
    check_accumulate(a, b, [a, c, a], **weights)
    check_accumulate(a, b, [c, b], **weights)


@pytest.mark.parametrize(
    "frozen",
    [
        ("partial",),
        ("delta",),
        ("partial", "delta"),
        ("blocks[0]", "blocks[1]", "blocks[2]"),
        ("blocks[1]", "partial", "query"),
        ("query", "key_weight", "out_weight"),
        ("partial", "delta", "blocks[0]", "blocks[1]", "blocks[2]"),
    ],
)
def test_frozen_inputs(device: str, frozen: tuple[str, ...]) -> None:
    partial, delta, *blocks = make_sources(5, (3, 24), device=device)
    weights = make_weights(24, device=device)
    every = check_accumulate(partial, delta, blocks, **weights)
    some = check_accumulate(partial, delta, blocks, frozen=frozen, **weights)
    for name, value in some.items():
        assert_same_bits(name, value, every[name])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_save_levels_agree_bit_for_bit(device: str, dtype: torch.dtype, norm: bool) -> None:
    partial, delta, *blocks = make_sources(6, (3, 100), dtype=dtype, device=device)
    arguments = {
        "partial": partial,
        "delta": delta,
        "blocks": blocks,
        **make_weights(100, device=device, norm=norm),
    }
    nothing, _ = evaluate(accumulate, ops, {**arguments, "save": "nothing"})
    for save in ("stats", "output"):
        assert_all_same_bits(nothing, evaluate(accumulate, ops, {**arguments, "save": save})[0])


@pytest.mark.parametrize("scale", [0.125, -2.0])
@pytest.mark.parametrize(("eps", "out_eps"), [(1e-5, 1e-2), (0.5, None)])
def test_scale_and_eps(device: str, scale: float, eps: float, out_eps: float | None) -> None:
    partial, delta, *blocks = make_sources(4, (4, 24), device=device)
    weights = make_weights(24, device=device)
    check_accumulate(partial, delta, blocks, scale=scale, eps=eps, out_eps=out_eps, **weights)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (24, 1)])
def test_query_shapes(device: str, shape: tuple[int, ...]) -> None:
    partial, delta, *blocks = make_sources(4, (4, 24), dtype=torch.bfloat16, device=device)
    weights = make_weights(24, dtype=torch.bfloat16, device=device)
    weights["query"] = weights["query"].reshape(shape)
    check_accumulate(partial, delta, blocks, **weights)


@pytest.mark.parametrize("shape", [(0, 17), (2, 0, 17)])
def test_no_tokens(device: str, shape: tuple[int, ...]) -> None:
    partial, delta, *blocks = make_sources(4, shape, dtype=torch.bfloat16, device=device)
    results = check_accumulate(partial, delta, blocks, **make_weights(17, device=device))
    assert (results["gradient of query"] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["partial", "delta", "block"])
def test_bad_rows_stay_in_their_row(device: str, bad: float, where: str) -> None:
    partial, delta, *blocks = make_sources(4, (6, 40), dtype=torch.bfloat16, device=device)
    arguments = {
        "partial": partial,
        "delta": delta,
        "blocks": blocks,
        **make_weights(40, device=device),
    }
    clean, _ = evaluate(accumulate, ops, arguments)
    {"partial": partial, "delta": delta, "block": blocks[1]}[where][3, 11] = bad
    dirty, _ = evaluate(accumulate, ops, arguments)
    others = [0, 1, 2, 4, 5]
    assert not dirty["output 0"][3].isfinite().any()
    rows = [
        "output 0",
        "output 1",
        "gradient of partial",
        "gradient of delta",
        "gradient of blocks[0]",
    ]
    for name in rows:
        assert_same_bits(name, dirty[name][others], clean[name][others])


def test_a_block_of_sublayers(device: str) -> None:
    """Accumulating sublayer after sublayer, differentiated end to end (paper, Eq. 5-6)."""

    def block(
        module: Any, embedding: Any, deltas: Any, query: Any, key_weight: Any, out_weight: Any
    ) -> Any:
        partial, blocks, hiddens = None, [embedding], []
        for i, delta in enumerate(deltas):
            if i == 2:
                blocks, partial = [*blocks, partial], None
            hidden, partial = module.accumulate_depth_attention(
                partial, delta, blocks, query, key_weight, out_weight=out_weight
            )
            hiddens.append(hidden)
        return (*hiddens, partial)

    embedding, *deltas = make_sources(6, (4, 40), device=device)
    check(block, {"embedding": embedding, "deltas": deltas, **make_weights(40, device=device)})
