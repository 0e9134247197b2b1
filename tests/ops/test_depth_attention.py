"""``depth_attention``: every promise it makes, forward and backward, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnres_ext import ops
from tests.helpers import assert_all_same_bits, assert_same_bits, check, evaluate
from tests.ops.cases import DTYPES, HIDDEN_SIZES, LAYOUTS, make_sources, make_vector, make_weights


def depth_attention(
    module: Any, sources: Any, query: Any, key_weight: Any = None, **options: Any
) -> Any:
    return module.depth_attention(sources, query, key_weight, **options)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
def test_matches_definition(device: str, dtype: torch.dtype, hidden: int, norm: bool) -> None:
    sources = make_sources(4, (3, hidden), dtype=dtype, device=device, spread=2.0)
    check(depth_attention, {"sources": sources, **make_weights(hidden, device=device, norm=norm)})


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 10, 33, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_sources(device: str, dtype: torch.dtype, count: int) -> None:
    sources = make_sources(count, (2, 3, 24), dtype=dtype, device=device)
    check(depth_attention, {"sources": sources, **make_weights(24, device=device)})


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_long_rows(device: str, dtype: torch.dtype, norm: bool) -> None:
    """More rows than are mixed side by side, each of several runs of columns and an odd rest."""
    sources = make_sources(27, (2, 683), dtype=dtype, device=device)
    check(depth_attention, {"sources": sources, **make_weights(683, device=device, norm=norm)})


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, dtype: torch.dtype, layout: str, norm: bool) -> None:
    sources = make_sources(3, (2, 4, 40), dtype=dtype, layout=layout, device=device)
    check(depth_attention, {"sources": sources, **make_weights(40, device=device, norm=norm)})


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 1, 3, 2, 40)])
def test_mixed_layouts_and_ranks(device: str, shape: tuple[int, ...]) -> None:
    layout = ["contiguous"] if len(shape) == 1 else list(LAYOUTS)
    sources = make_sources(7, shape, layout=layout, device=device)
    check(depth_attention, {"sources": sources, **make_weights(40, device=device)}, tokens=12)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float64),
    ],
)
def test_mixed_dtypes(device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    sources = make_sources(4, (2, 3, 33), dtype=dtypes, layout=list(LAYOUTS), device=device)
    check(depth_attention, {"sources": sources, **make_weights(33, device=device)})


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_dtypes(device: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    sources = make_sources(3, (4, 24), dtype=dtype, device=device)
    weights = make_weights(24, dtype=weight_dtype, device=device)
    check(depth_attention, {"sources": sources, **weights})
    # Each weight may come in a dtype of its own.
    weights["query"] = weights["query"].bfloat16()
    weights["out_weight"] = weights["out_weight"].float()
    check(depth_attention, {"sources": sources, **weights})


@pytest.mark.parametrize("shape", [(24,), (1, 24), (24, 1)])
def test_query_shapes(device: str, shape: tuple[int, ...]) -> None:
    sources = make_sources(3, (4, 24), device=device)
    weights = make_weights(24, device=device)
    flat, _ = evaluate(depth_attention, ops, {"sources": sources, **weights})
    weights["query"] = weights["query"].reshape(shape)
    shaped = check(depth_attention, {"sources": sources, **weights})
    assert shaped["gradient of query"].shape == shape
    assert_same_bits("output", flat["output 0"], shaped["output 0"])


def test_strided_weights(device: str) -> None:
    """Weights may be rows, columns or slices of bigger parameters."""
    table = torch.randn(24, 6, device=device)
    sources = make_sources(3, (4, 24), device=device)
    weights = {"query": table[:, 1], "key_weight": table[:, 2], "out_weight": table[:, 4]}
    check(depth_attention, {"sources": sources, **weights})
    weights["query"] = torch.randn(1, device=device).expand(24)
    check(depth_attention, {"sources": sources, **weights})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sources_as_a_stack(device: str, dtype: torch.dtype) -> None:
    """A tuple or one tensor ``[N, ..., D]`` is a list of sources; a stack gets one gradient."""
    sources = make_sources(3, (2, 4, 40), dtype=dtype, device=device)
    weights = make_weights(40, device=device)
    expected, _ = evaluate(depth_attention, ops, {"sources": sources, **weights})
    stacked, _ = evaluate(depth_attention, ops, {"sources": torch.stack(sources), **weights})
    assert_same_bits("output", stacked["output 0"], expected["output 0"])
    for i in range(3):
        assert_same_bits(
            "gradient", stacked["gradient of sources"][i], expected[f"gradient of sources[{i}]"]
        )
    assert_same_bits("output", ops.depth_attention(tuple(sources), **weights), expected["output 0"])


@pytest.mark.parametrize("scale", [1.0, 0.125, -2.0, 0.0])
@pytest.mark.parametrize(("eps", "out_eps"), [(1e-6, None), (1e-5, 1e-2), (0.5, 0.0), (0.0, None)])
def test_scale_and_eps(device: str, scale: float, eps: float, out_eps: float | None) -> None:
    sources = make_sources(3, (4, 24), device=device)
    options = {"scale": scale, "eps": eps, "out_eps": out_eps}
    check(depth_attention, {"sources": sources, **make_weights(24, device=device), **options})


def test_out_eps_defaults_to_eps(device: str) -> None:
    sources = make_sources(3, (4, 24), device=device)
    weights = make_weights(24, device=device)
    a = ops.depth_attention(sources, **weights, eps=0.25)
    b = ops.depth_attention(sources, **weights, eps=0.25, out_eps=0.25)
    c = ops.depth_attention(sources, **weights, eps=0.25, out_eps=1e-6)
    assert_same_bits("output", a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_weight_none_is_ones(device: str, dtype: torch.dtype) -> None:
    sources = make_sources(3, (4, 33), dtype=dtype, device=device)
    query = make_vector(33, device=device)
    none = check(depth_attention, {"sources": sources, "query": query})
    ones, _ = evaluate(
        depth_attention,
        ops,
        {"sources": sources, "query": query, "key_weight": torch.ones(33, device=device)},
    )
    ones.pop("gradient of key_weight")
    assert_all_same_bits(none, ones)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_source(device: str, dtype: torch.dtype, norm: bool) -> None:
    """One source: the weight is exactly 1 and the query's gradient exactly 0."""
    (source,) = make_sources(1, (3, 17), dtype=dtype, device=device)
    weights = make_weights(17, device=device, norm=norm)
    results = check(depth_attention, {"sources": [source], **weights, "return_weights": True})
    assert (results["output 1"] == 1).all()
    assert (results["gradient of query"] == 0).all()
    assert (results["gradient of key_weight"] == 0).all()
    if not norm:
        assert_same_bits("output", results["output 0"], source)


@pytest.mark.parametrize("layout", ["contiguous", "padded_rows", "strided_inside", "transposed"])
@pytest.mark.parametrize(
    "shape", [(0, 17), (2, 0, 17), (0, 3, 17), (0, 0, 0, 17), (2, 0, 3, 0, 17)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_tokens(device: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    """No rows: an empty output, zero gradients for the weights."""
    sources = make_sources(3, shape, dtype=dtype, layout=layout, device=device)
    results = check(depth_attention, {"sources": sources, **make_weights(17, device=device)})
    assert results["output 0"].shape == shape
    for name in ("query", "key_weight", "out_weight"):
        assert (results[f"gradient of {name}"] == 0).all()
    _, weights = ops.depth_attention(sources, make_vector(17, device=device), return_weights=True)
    assert weights.shape == (3, *shape[:-1])


@pytest.mark.parametrize("save", ["nothing", "stats", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_source_twice(device: str, dtype: torch.dtype, save: str) -> None:
    """A tensor that appears k times in the list gets the sum of k gradients."""
    a, b = make_sources(2, (4, 40), dtype=dtype, device=device)
    weights = make_weights(40, device=device)
    check(depth_attention, {"sources": [a, b, a, a], **weights, "save": save})
    # Views of one storage are tensors of their own.
    check(depth_attention, {"sources": [a, a.view(4, 40), b[:, :]], **weights, "save": save})


def test_permuting_sources_changes_nothing(device: str) -> None:
    sources = make_sources(6, (3, 40), dtype=torch.float64, device=device)
    weights = make_weights(40, dtype=torch.float64, device=device)
    order = [3, 0, 5, 1, 4, 2]
    arguments = {**weights, "return_weights": True}
    a, _ = evaluate(depth_attention, ops, {"sources": sources, **arguments})
    torch.testing.assert_close(
        ops.depth_attention([sources[i] for i in order], **weights),
        a["output 0"],
        rtol=1e-13,
        atol=1e-14,
    )
    _, mixed = ops.depth_attention([sources[i] for i in order], **weights, return_weights=True)
    torch.testing.assert_close(mixed, a["output 1"][order], rtol=1e-13, atol=1e-14)


# ---- returned weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_returned_weights(device: str, dtype: torch.dtype) -> None:
    sources = make_sources(5, (2, 3, 40), dtype=dtype, layout=list(LAYOUTS), device=device)
    arguments = {"sources": sources, **make_weights(40, device=device), "return_weights": True}
    results = check(depth_attention, arguments)
    weights = results["output 1"]
    assert weights.shape == (5, 2, 3)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))


@pytest.mark.parametrize("save", ["nothing", "stats", "output"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradient_through_weights_alone(device: str, save: str, norm: bool) -> None:
    """A loss on the weights (an entropy, say) trains; the output may stay unused."""

    def entropy(module: Any, sources: Any, **arguments: Any) -> Any:
        _, weights = module.depth_attention(sources, **arguments, return_weights=True)
        return -(weights * weights.log()).sum(0)

    sources = make_sources(4, (3, 40), device=device)
    weights = make_weights(40, device=device, norm=norm)
    # What does not reach the loss may come back as None or as zeros.
    frozen = ["out_weight"] if norm else []
    check(entropy, {"sources": sources, **weights, "save": save}, frozen=frozen, tokens=3)


def test_gradient_through_output_alone(device: str) -> None:
    def first(module: Any, **arguments: Any) -> Any:
        return depth_attention(module, **arguments, return_weights=True)[0]

    sources = make_sources(4, (3, 40), device=device)
    weights = make_weights(40, device=device)
    a = check(first, {"sources": sources, **weights})
    b, _ = evaluate(depth_attention, ops, {"sources": sources, **weights})
    assert_all_same_bits(a, b)


def test_weights_do_not_change_the_output(device: str) -> None:
    sources = make_sources(4, (3, 40), dtype=torch.bfloat16, device=device)
    weights = make_weights(40, device=device)
    a = ops.depth_attention(sources, **weights)
    b, _ = ops.depth_attention(sources, **weights, return_weights=True)
    assert_same_bits("output", a, b)


# ---- what requires a gradient


@pytest.mark.parametrize(
    "frozen",
    [
        ("query",),
        ("key_weight",),
        ("out_weight",),
        ("query", "key_weight", "out_weight"),
        ("sources[0]",),
        ("sources[0]", "sources[1]", "sources[2]"),
        ("sources[1]", "query", "out_weight"),
        ("sources[0]", "sources[1]", "sources[2]", "key_weight", "out_weight"),
    ],
)
@pytest.mark.parametrize("save", ["nothing", "stats", "output"])
def test_frozen_inputs(device: str, frozen: tuple[str, ...], save: str) -> None:
    """Frozen inputs get None, and what the others get does not change by a bit."""
    sources = make_sources(3, (4, 40), device=device)
    arguments = {"sources": sources, **make_weights(40, device=device), "save": save}
    every, _ = evaluate(depth_attention, ops, arguments)
    some = check(depth_attention, arguments, frozen=frozen)
    for name, value in some.items():
        assert_same_bits(name, value, every[name])

    leaves = [
        s.clone().requires_grad_(f"sources[{i}]" not in frozen) for i, s in enumerate(sources)
    ]
    weights = {
        n: arguments[n].clone().requires_grad_(n not in frozen)
        for n in ("query", "key_weight", "out_weight")
    }
    ops.depth_attention(leaves, **weights, save=save).sum().backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (f"sources[{i}]" in frozen)
    for name, weight in weights.items():
        assert (weight.grad is None) == (name in frozen)


def test_nothing_requires_a_gradient(device: str) -> None:
    sources = make_sources(3, (4, 40), device=device)
    weights = make_weights(40, device=device)
    assert not ops.depth_attention(sources, **weights).requires_grad
    leaf = sources[0].clone().requires_grad_()
    with torch.no_grad():
        assert not ops.depth_attention([leaf, *sources[1:]], **weights).requires_grad
    with torch.inference_mode():
        out = ops.depth_attention([leaf, *sources[1:]], **weights)
    assert_same_bits("output", out, ops.depth_attention([leaf, *sources[1:]], **weights).detach())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_save_levels_agree_bit_for_bit(device: str, dtype: torch.dtype, norm: bool) -> None:
    sources = make_sources(5, (3, 100), dtype=dtype, device=device)
    arguments = {"sources": sources, **make_weights(100, device=device, norm=norm)}
    for extra in ({}, {"return_weights": True}):
        nothing, _ = evaluate(depth_attention, ops, {**arguments, **extra, "save": "nothing"})
        for save in ("stats", "output"):
            assert_all_same_bits(
                nothing, evaluate(depth_attention, ops, {**arguments, **extra, "save": save})[0]
            )


def test_backward_twice(device: str) -> None:
    """A retained graph gives the same gradient again; ``.grad`` accumulates it."""
    sources = [s.requires_grad_() for s in make_sources(3, (4, 40), device=device)]
    weights = make_weights(40, device=device)
    out = ops.depth_attention(sources, **weights)
    out.sum().backward(retain_graph=True)
    once = [s.grad.clone() for s in sources]
    out.sum().backward()
    for s, g in zip(sources, once, strict=True):
        assert_same_bits("gradient", s.grad, 2 * g)


@pytest.mark.parametrize("form", ["expanded", "transposed", "zeros"])
def test_gradient_layouts(device: str, form: str) -> None:
    """The gradient that arrives may itself be strided: ``sum()`` expands a scalar."""
    sources = make_sources(3, (2, 4, 40), device=device)
    weights = make_weights(40, device=device)
    grad = {
        "expanded": torch.randn((), device=device).expand(2, 4, 40),
        "transposed": torch.randn(40, 4, 2, device=device).permute(2, 1, 0),
        "zeros": torch.zeros(2, 4, 40, device=device),
    }[form]
    leaves = [s.clone().requires_grad_() for s in sources]
    a = torch.autograd.grad(ops.depth_attention(leaves, **weights), leaves, grad)
    b = torch.autograd.grad(ops.depth_attention(leaves, **weights), leaves, grad.contiguous())
    for x, y in zip(a, b, strict=True):
        assert_same_bits("gradient", x, y)


# ---- numbers at the edge


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_bad_rows_stay_in_their_row(
    device: str, dtype: torch.dtype, bad: float, whole: bool
) -> None:
    sources = make_sources(4, (9, 40), dtype=dtype, device=device)
    weights = make_weights(40, device=device)
    clean, _ = evaluate(
        depth_attention, ops, {"sources": sources, **weights, "return_weights": True}
    )
    sources[2][5] = torch.full((40,), bad) if whole else sources[2][5]
    sources[2][5, 17] = bad
    dirty, _ = evaluate(
        depth_attention, ops, {"sources": sources, **weights, "return_weights": True}
    )
    others = [r for r in range(9) if r != 5]
    assert not dirty["output 0"][5].isfinite().any()
    assert_same_bits("output", dirty["output 0"][others], clean["output 0"][others])
    assert_same_bits("weights", dirty["output 1"][:, others], clean["output 1"][:, others])
    for i in range(4):
        name = f"gradient of sources[{i}]"
        assert_same_bits(name, dirty[name][others], clean[name][others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(device: str, dtype: torch.dtype) -> None:
    """Logits of about +-1e4 do not overflow; the softmax becomes a choice."""
    hidden = 64
    direction, *others = torch.linalg.qr(torch.randn(hidden, 4, device=device)).Q.unbind(1)
    # Logits of 10000, 7071, 0 and -10000, and what rounding the sources makes of them: far enough
    # apart that no order of summation decides.
    sources = [direction, direction + others[0], others[1] + others[2], -direction]
    sources = [(s * torch.rand(6, 1, device=device).add(0.5)).to(dtype) for s in sources]
    query = 1e4 / hidden**0.5 * direction
    arguments = {"sources": sources, "query": query, "return_weights": True}
    results = check(depth_attention, arguments)
    for value in results.values():
        assert value.isfinite().all()
    assert results["output 1"].T.tolist() == [[1, 0, 0, 0]] * 6


@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_ties(device: str, size: float) -> None:
    """Equal sources share equally, whatever the size of their logits."""
    source = torch.randn(5, 64, device=device)
    query = size * torch.nn.functional.normalize(torch.randn(64, device=device), dim=0)
    arguments = {
        "sources": [source.clone() for _ in range(4)],
        "query": query,
        "return_weights": True,
    }
    results = check(depth_attention, arguments)
    assert (results["output 1"] == 0.25).all()
    assert_same_bits("output", results["output 0"], source)


def test_zero_query_is_the_mean(device: str) -> None:
    """Zero-initialised queries read the equal-weight average of the sources (paper, 3.1)."""
    sources = make_sources(8, (3, 40), device=device)
    results = check(
        depth_attention,
        {"sources": sources, "query": torch.zeros(40, device=device), "return_weights": True},
    )
    assert (results["output 1"] == 0.125).all()
    torch.testing.assert_close(results["output 0"], torch.stack(sources).mean(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
def test_zero_rows(device: str, dtype: torch.dtype, norm: bool) -> None:
    """Rows of zeros (a fresh partial) are finite, forward and backward: eps keeps them so."""
    sources = make_sources(3, (4, 24), dtype=dtype, device=device)
    sources[1].zero_()
    for source in sources:
        source[2].zero_()
    results = check(
        depth_attention, {"sources": sources, **make_weights(24, device=device, norm=norm)}
    )
    for value in results.values():
        assert value.isfinite().all()


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_source_sizes(device: str, dtype: torch.dtype, size: float) -> None:
    sources = [(size * s).to(dtype) for s in make_sources(4, (5, 100), device=device, spread=4.0)]
    check(depth_attention, {"sources": sources, **make_weights(100, device=device)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens(device: str, dtype: torch.dtype) -> None:
    """Enough rows for every thread: weight gradients sum over all of them."""
    sources = make_sources(3, (1000, 40), dtype=dtype, device=device)
    check(depth_attention, {"sources": sources, **make_weights(40, device=device)})
