"""The same bits: run to run, on any number of threads, and for a row whatever its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext import ops
from tests.helpers import assert_all_same_bits, assert_same_bits, evaluate
from tests.ops.cases import make_sources, make_weights


def depth_attention(module: Any, sources: Any, **o: Any) -> Any:
    return module.depth_attention(sources, **o, return_weights=True)


def accumulate(module: Any, sources: Any, **o: Any) -> Any:
    return module.accumulate_depth_attention(sources[0], sources[1], sources[2:], **o)


def inter_block(module: Any, sources: Any, query: Any, key_weight: Any, **_: Any) -> Any:
    queries = torch.stack([query, -query, 2 * query])
    out, lse = module.inter_block_attention(sources, queries, key_weight.expand(3, -1))
    # Rows first, as in the other operators.
    return out.movedim(0, -2), lse.movedim(0, -1)


def merge(module: Any, sources: Any, **o: Any) -> Any:
    lse = sources[3][..., 0].float()
    return module.merge_partial(sources[2], lse, sources[0], sources[1], **o)


OPERATORS: list[Callable[..., Any]] = [depth_attention, accumulate, inter_block, merge]
NAMES = [f.__name__ for f in OPERATORS]


def make(rows: int, hidden: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    sources = make_sources(4, (rows, hidden), dtype=dtype, device=device)
    return {"sources": sources, **make_weights(hidden, device=device)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_run_to_run(device: str, operator: Any, dtype: torch.dtype) -> None:
    arguments = make(700, 96, dtype, device)
    first, _ = evaluate(operator, ops, arguments)
    for _ in range(3):
        assert_all_same_bits(first, evaluate(operator, ops, arguments)[0])


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_any_number_of_threads(operator: Any, dtype: torch.dtype) -> None:
    """Weight gradients, too: partial sums are over fixed rows and added in a fixed order."""
    arguments = make(2500, 96, dtype, "cpu")
    torch.set_num_threads(1)
    one, _ = evaluate(operator, ops, arguments)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_all_same_bits(one, evaluate(operator, ops, arguments)[0])


def rows_of(results: dict[str, Tensor | None], index: Any, rows: int) -> dict[str, Tensor | None]:
    """What belongs to the tokens of ``index``; weight gradients belong to all tokens."""
    found: dict[str, Tensor | None] = {}
    for name, value in results.items():
        if value is None or name.endswith(("query", "_weight")):
            continue
        tokens = 0 if value.shape[0] == rows else 1  # returned weights are [N, tokens]
        found[name] = value.index_select(tokens, index)
    return found


@pytest.mark.parametrize("hidden", [17, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_a_row_depends_on_itself_alone(
    device: str, operator: Any, dtype: torch.dtype, hidden: int
) -> None:
    """Batch invariance: any subset of rows, in any order, gives the bits of the full batch."""
    rows = 37
    arguments = make(rows, hidden, dtype, device)
    grad = torch.randn(rows, 64, device=device)

    def differentiable(module: Any, sources: Any, grads: Tensor, **o: Any) -> Any:
        # The gradient that arrives at a row must travel with the row.
        outputs = operator(module, sources, **o)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = []
        for out in outputs:
            tokens = 0 if out.shape[0] == grads.shape[0] else 1
            flat = out.movedim(tokens, 0).flatten(1).double()
            total.append((flat * grads[:, :1].double()).sum(1))
        return (*outputs, torch.stack(total, dim=1))

    def run(index: Tensor) -> dict[str, Tensor | None]:
        picked = {**arguments, "sources": [s[index] for s in arguments["sources"]]}
        leaves = [s.requires_grad_() for s in picked.pop("sources")]
        outputs = differentiable(ops, leaves, grad[index], **picked)
        gradients = torch.autograd.grad(outputs[-1].sum(), leaves)
        results: dict[str, Tensor | None] = {f"output {i}": o for i, o in enumerate(outputs[:-1])}
        results.update({f"gradient of sources[{i}]": g for i, g in enumerate(gradients)})
        return results

    everything = torch.arange(rows, device=device)
    full = run(everything)
    for subset in ([0], [36], [5, 6, 7], list(range(36, -1, -1)), [3] * 5, list(range(1, 37))):
        index = torch.tensor(subset, device=device)
        expected = rows_of(full, index, rows)
        actual = run(index)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_bits(f"{name}, rows {subset[:4]}", actual[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_where_queries_and_gains_lie_changes_no_bit(
    device: str, operator: Any, dtype: torch.dtype
) -> None:
    """In a flat buffer of parameters they lie anywhere, be the rows copied 16 bytes at a time."""
    arguments = {
        "sources": make_sources(4, (3, 5, 40), dtype=dtype, device=device),
        **make_weights(40, device=device),
    }
    dense, _ = evaluate(operator, ops, arguments)
    for name in arguments.keys() - {"sources"}:
        values = arguments[name]
        arguments[name] = torch.cat([values.new_zeros(1), values])[1:]
    flat, _ = evaluate(operator, ops, arguments)
    assert_all_same_bits(flat, dense)


@pytest.mark.parametrize("layout", ["padded_rows", "unaligned", "sliced_tokens", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_layout_does_not_change_a_bit(
    device: str, operator: Any, dtype: torch.dtype, layout: str
) -> None:
    sources = make_sources(4, (3, 5, 33), dtype=dtype, layout=layout, device=device)
    weights = make_weights(33, device=device)
    strided, _ = evaluate(operator, ops, {"sources": sources, **weights})
    dense, _ = evaluate(operator, ops, {"sources": [s.contiguous() for s in sources], **weights})
    assert_all_same_bits(strided, dense)


@pytest.mark.parametrize("hidden", [5, 63, 96, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_how_rows_are_stored_changes_no_bit(dtype: torch.dtype, hidden: int) -> None:
    """On the CPU equal values give equal results, as halves, as floats, and some of each."""
    halves = make_sources(4, (7, hidden), dtype=dtype)
    floats = [source.float() for source in halves]
    some = [halves[0], floats[1], halves[2], floats[3]]
    options = make_weights(hidden)
    for operator in (depth_attention, inter_block):
        as_halves = operator(ops, halves, **options)
        as_floats = operator(ops, floats, **options)
        for half, single, mixed in zip(
            as_halves, as_floats, operator(ops, some, **options), strict=True
        ):
            assert_same_bits("some of each", mixed, single)
            assert_same_bits("halves", half, single.to(half.dtype))
