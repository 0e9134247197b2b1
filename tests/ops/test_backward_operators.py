"""The backward operators: dtypes, what is not needed, and accumulation in the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnres_ext
from tests.helpers import (
    assert_same_bits,
    assert_same_sums,
    magnitude,
    order_of_sums,
    runs_cuda_kernels,
)
from tests.ops.cases import LAYOUTS, make_sources, make_weights

TOKENS, HIDDEN, COUNT = 6, 40, 3


def ops() -> Any:
    return torch.ops.attnres


def make(
    op: str, dtype: torch.dtype, device: str, *, saved: bool = True, layout: str = "contiguous"
) -> dict[str, Any]:
    """Arguments of ``<op>_backward``: everything needed, statistics saved by the forward or not."""
    sources = make_sources(COUNT, (TOKENS, HIDDEN), dtype=dtype, layout=layout, device=device)
    weights = make_weights(HIDDEN, dtype=torch.bfloat16, device=device)
    if op == "inter_block_attention":
        queries = torch.randn(2, HIDDEN, device=device).bfloat16()
        gains = torch.randn(2, HIDDEN, device=device).bfloat16()
        out, lse, stats = ops().inter_block_attention_with_stats(sources, queries, gains)
        return {
            "grad_out": torch.randn_like(out),
            "grad_lse": torch.randn_like(lse),
            "blocks": sources,
            "queries": queries,
            "key_weights": gains,
            "stats": stats if saved else None,
            "eps": 1e-6,
            "scale": 1.0,
            "needs": [True] * (COUNT + 2),
        }
    options = {"eps": 1e-6, "out_eps": 1e-5, "scale": 1.0}
    read = {
        "query": weights["query"],
        "key_weight": weights["key_weight"],
        "out_weight": weights["out_weight"],
    }
    save = {"save_stats": True, "save_mix": True}
    if op == "depth_attention":
        out, _, stats, mix = ops().depth_attention_with_stats(sources, **read, **options, **save)
        return {
            "grad_out": torch.randn_like(out),
            "grad_weights": torch.randn(COUNT, TOKENS, device=device),
            "sources": sources,
            **read,
            "stats": stats if saved else None,
            "mix": mix if saved else None,
            **options,
            "needs": [True] * (COUNT + 3),
        }
    partial, delta = make_sources(2, (TOKENS, HIDDEN), dtype=dtype, layout=layout, device=device)
    out, new_partial, stats, mix = ops().accumulate_depth_attention_with_stats(
        partial, delta, sources, **read, **options, **save
    )
    return {
        "grad_hidden": torch.randn_like(out),
        "grad_new_partial": torch.randn_like(out),
        "blocks": sources,
        "new_partial": new_partial,
        **read,
        "stats": stats if saved else None,
        "mix": mix if saved else None,
        **options,
        "needs": [True] * (COUNT + 4),
    }


def backward(op: str, arguments: dict[str, Any]) -> list[Any]:
    return list(getattr(ops(), f"{op}_backward")(**arguments))


def assert_same(name: str, a: Tensor, b: Tensor, *, bits: bool) -> None:
    """The same bits; or the same sums, by kernels that take them in different orders."""
    if bits:
        assert_same_bits(name, a, b)
    else:
        assert_same_sums(name, a, b, TOKENS * COUNT * HIDDEN)


def in_place(
    op: str, arguments: dict[str, Any], gradients: list[Tensor], add: list[bool]
) -> list[Tensor]:
    name = "grad_sources" if op == "depth_attention" else "grad_blocks"
    result = getattr(ops(), f"{op}_backward_")(**arguments, **{name: gradients}, accumulate=add)
    return list(result)


OPS = ["depth_attention", "accumulate_depth_attention", "inter_block_attention"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_dtypes_and_shapes(device: str, op: str, dtype: torch.dtype, saved: bool) -> None:
    """A gradient has the dtype and the shape of what it is the gradient of."""
    arguments = make(op, dtype, device, saved=saved)
    sources, *rest = backward(op, arguments)
    assert [g.dtype for g in sources] == [dtype] * COUNT
    assert [g.shape for g in sources] == [(TOKENS, HIDDEN)] * COUNT
    if op == "accumulate_depth_attention":
        partial = rest.pop(0)
        assert partial.dtype == dtype
        assert partial.shape == (TOKENS, HIDDEN)
    for gradient in rest:
        assert gradient.dtype == torch.bfloat16
        assert gradient.shape == ((2, HIDDEN) if op == "inter_block_attention" else (HIDDEN,))
    for gradient in (*sources, *rest):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("saved", [False, True])
def test_unneeded_gradients_have_no_elements(device: str, op: str, saved: bool) -> None:
    """What is not needed is not computed, and what is does not change by a bit."""
    arguments = make(op, torch.bfloat16, device, saved=saved)
    sources, *rest = backward(op, arguments)
    every = [*sources, *rest]
    for kept in range(len(every)):
        needs = [i == kept for i in range(len(every))]
        found_sources, *found_rest = backward(op, {**arguments, "needs": needs})
        for i, gradient in enumerate([*found_sources, *found_rest]):
            if i == kept:
                assert_same_bits(f"gradient {i}", gradient, every[i])
            else:
                assert gradient.numel() == 0
    found_sources, *found_rest = backward(op, {**arguments, "needs": [False] * len(every)})
    assert all(g.numel() == 0 for g in (*found_sources, *found_rest))


@pytest.mark.parametrize("layout", ["contiguous", "padded_rows", "unaligned", "sliced_tokens"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_accumulation(device: str, op: str, dtype: torch.dtype, layout: str) -> None:
    """Beta 0 overwrites whatever is there, NaN included; beta 1 adds, with one rounding."""
    arguments = make(op, dtype, device)
    sources, *rest = backward(op, arguments)
    add = [False, True, True]
    # Rows that cannot be copied 16 bytes at a time have a kernel of their own on CUDA.
    bits = not runs_cuda_kernels(device) or layout in ("contiguous", "sliced_tokens")
    gradients = make_sources(COUNT, (TOKENS, HIDDEN), dtype=dtype, layout=layout, device=device)
    gradients[0].fill_(torch.nan)
    before = [g.clone() for g in gradients]
    same = in_place(op, arguments, gradients, add)
    for i, gradient in enumerate(rest):
        assert_same(f"weight gradient {i}", same[i], gradient, bits=bits)
    assert_same("overwritten", gradients[0], sources[0], bits=bits)
    for i in (1, 2):
        # Rounded once, after the addition: half an ulp of the sum away from the exact one, where
        # the fresh gradient itself was rounded by half an ulp.
        expected = before[i].double() + sources[i].double()
        eps = torch.finfo(dtype).eps
        bound = eps * (magnitude(expected) + magnitude(sources[i]))
        if not bits:
            bound += order_of_sums(dtype, TOKENS * COUNT * HIDDEN) * magnitude(sources[i])
        assert (gradients[i].double() - expected).abs().max().item() <= bound


@pytest.mark.parametrize("op", OPS)
def test_accumulation_rounds_once(device: str, op: str) -> None:
    """Into a float32 buffer bf16 sources accumulate without rounding to bf16 in between."""
    arguments = make(op, torch.bfloat16, device)
    wide = [torch.zeros(TOKENS, HIDDEN, device=device) for _ in range(COUNT)]
    in_place(op, arguments, wide, [False] * COUNT)
    sources, *_ = backward(op, arguments)
    # On CUDA rows of two dtypes do without tensor cores, which sum in another order.
    bits = not runs_cuda_kernels(device)
    for i in range(COUNT):
        assert_same("rounded", wide[i].bfloat16(), sources[i], bits=bits)
        assert not torch.equal(wide[i], sources[i].float())
    twice = [w.clone() for w in wide]
    in_place(op, arguments, twice, [True] * COUNT)
    for i in range(COUNT):
        torch.testing.assert_close(twice[i], 2 * wide[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_accumulation_of_some(device: str, op: str) -> None:
    """One buffer for each source that needs a gradient, in order."""
    arguments = make(op, torch.float32, device)
    sources, *_ = backward(op, arguments)
    arguments["needs"][1] = False
    gradients = [torch.ones(TOKENS, HIDDEN, device=device) for _ in range(2)]
    in_place(op, arguments, gradients, [True, False])
    torch.testing.assert_close(gradients[0], 1 + sources[0])
    assert_same_bits("gradient", gradients[1], sources[2])
    in_place(op, {**arguments, "needs": [False] * len(arguments["needs"])}, [], [])


def test_sites_into_one_buffer(device: str) -> None:
    """Many sites deposit into one buffer per source; the sum is what autograd's adds would give."""
    sources = make_sources(COUNT, (TOKENS, HIDDEN), device=device)
    buffers = [torch.full((TOKENS, HIDDEN), torch.nan, device=device) for _ in range(COUNT)]
    leaves = [s.clone().requires_grad_() for s in sources]
    total = 0.0
    for site in range(5):
        weights = make_weights(HIDDEN, device=device)
        grad = torch.randn(TOKENS, HIDDEN, device=device)
        out = attnres_ext.depth_attention(leaves, **weights)
        total = total + (out * grad).sum()
        ops().depth_attention_backward_(
            grad, None, sources, weights["query"], weights["key_weight"], weights["out_weight"],
            None, None, 1e-6, None, 1.0, [True] * COUNT + [False] * 3, buffers, [site > 0] * COUNT,
        )  # fmt: skip
    for buffer, gradient in zip(buffers, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(buffer, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_statistics_may_be_recomputed(device: str, op: str) -> None:
    """With and without what the forward saved: the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = make(op, dtype, device)
        sources, *rest = backward(op, arguments)
        lean = {n: None if n in ("stats", "mix") else v for n, v in arguments.items()}
        lean_sources, *lean_rest = backward(op, lean)
        for a, b in zip((*sources, *rest), (*lean_sources, *lean_rest), strict=True):
            assert_same_bits("gradient", a, b)


@pytest.mark.parametrize("value", [False, True])
def test_merge_partial_backward(device: str, value: bool) -> None:
    (out, partial) = make_sources(2, (TOKENS, HIDDEN), dtype=torch.bfloat16, device=device)
    weights = make_weights(HIDDEN, dtype=torch.bfloat16, device=device)
    arguments = {
        "grad_hidden": torch.randn_like(out),
        "grad_new_partial": torch.randn_like(out) if value else None,
        "out": out,
        "lse": torch.randn(TOKENS, device=device),
        "value": partial if value else None,
        **weights,
        "eps": 1e-6,
        "out_eps": None,
        "scale": 1.0,
    }
    every = ops().merge_partial_backward(**arguments, needs=[True] * 6)
    shapes = [(TOKENS, HIDDEN), (TOKENS,), (TOKENS, HIDDEN), (HIDDEN,), (HIDDEN,), (HIDDEN,)]
    dtypes = [torch.bfloat16, torch.float32, *[torch.bfloat16] * 4]
    for i, gradient in enumerate(every):
        if i == 2 and not value:
            assert gradient.numel() == 0
            continue
        assert gradient.shape == shapes[i]
        assert gradient.dtype == dtypes[i]
        assert gradient.isfinite().all()
        needs = [j == i for j in range(6)]
        alone = ops().merge_partial_backward(**arguments, needs=needs)
        assert_same_bits(f"gradient {i}", alone[i], gradient)
        assert all(alone[j].numel() == 0 for j in range(6) if j != i)


@pytest.mark.parametrize("layout", ["contiguous", "padded_rows", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_partial_backward_in_place(device: str, dtype: torch.dtype, layout: str) -> None:
    """Gradients of out and lse go where the caller says, over whatever is there: the same bits."""
    out, partial, target = make_sources(
        3, (TOKENS, HIDDEN), dtype=dtype, layout=layout, device=device
    )
    arguments = {
        "grad_hidden": torch.randn_like(out),
        "grad_new_partial": torch.randn_like(out),
        "out": out,
        "lse": torch.randn(TOKENS, device=device, dtype=torch.float64),
        "value": partial,
        **make_weights(HIDDEN, dtype=torch.bfloat16, device=device),
        "eps": 1e-6,
        "out_eps": None,
        "scale": 1.0,
    }
    grad_out, grad_lse, *others = ops().merge_partial_backward(**arguments, needs=[True] * 6)
    target.fill_(torch.nan)
    rows = torch.full((3, TOKENS), torch.nan, dtype=grad_lse.dtype, device=device)
    found = ops().merge_partial_backward_(
        **arguments, needs=[True] * 4, grad_out=target, grad_lse=rows[1]
    )
    assert_same_bits("out", target, grad_out)
    assert_same_bits("lse", rows[1], grad_lse)
    assert rows[0].isnan().all()
    assert rows[2].isnan().all()
    for i, gradient in enumerate(others):
        assert_same_bits(f"gradient {i}", found[i], gradient)
    lean = ops().merge_partial_backward_(
        **arguments, needs=[False] * 4, grad_out=target, grad_lse=rows[1]
    )
    assert all(gradient.numel() == 0 for gradient in lean)


def test_merge_partial_backward_in_place_refuses(device: str) -> None:
    out, partial, target = make_sources(3, (TOKENS, HIDDEN), device=device)
    lse = torch.randn(TOKENS, device=device)
    arguments = {
        "grad_hidden": torch.randn_like(out), "grad_new_partial": None, "out": out, "lse": lse,
        "value": partial, "query": torch.randn(HIDDEN, device=device), "key_weight": None,
        "out_weight": None, "eps": 1e-6, "out_eps": None, "scale": 1.0, "needs": [True] * 4,
        "grad_out": target, "grad_lse": torch.empty_like(lse),
    }  # fmt: skip
    for change, message in (
        ({"grad_out": target[1:]}, r"grad_out has shape \[5, 40\]"),
        ({"grad_out": out}, "grad_out shares memory with source 0"),
        ({"grad_out": arguments["grad_hidden"]}, "grad_out shares memory with the output's"),
        ({"grad_lse": torch.empty(TOKENS, device=device).double()}, "grad_lse must be a contig"),
        ({"grad_lse": torch.empty(TOKENS + 1, device=device)}, r"grad_lse has shape \[7\]"),
        ({"grad_lse": lse}, "grad_lse shares memory with lse"),
    ):
        with pytest.raises(RuntimeError, match=f"merge_partial: {message}"):
            ops().merge_partial_backward_(**{**arguments, **change})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stats(device: str, layout: str) -> None:
    """1/rms of each source, its logit with the scale applied, and their log-sum-exp."""
    sources = make_sources(COUNT, (2, 3, HIDDEN), layout=layout, device=device)
    weights = make_weights(HIDDEN, device=device, norm=False)
    out, _, stats, mix = ops().depth_attention_with_stats(
        sources, weights["query"], weights["key_weight"], None, 1e-6, None, 0.5, False, True, False
    )
    assert stats.shape == (2 * COUNT + 1, 2, 3)
    assert mix.numel() == 0
    values = torch.stack(sources)
    rstd = torch.rsqrt(values.square().mean(-1) + 1e-6)
    logits = 0.5 * (values * weights["query"] * weights["key_weight"]).sum(-1) * rstd
    torch.testing.assert_close(stats[:COUNT], rstd)
    torch.testing.assert_close(stats[COUNT:-1], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats[-1], torch.logsumexp(logits, 0), rtol=1e-5, atol=1e-5)
    expected = (torch.softmax(logits, 0).unsqueeze(-1) * values).sum(0)
    torch.testing.assert_close(out, expected)
