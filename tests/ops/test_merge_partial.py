"""``merge_partial`` (phase 2): merging the open partial, and two phases against one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext import ops, reference
from tests.helpers import assert_same_bits, check, evaluate
from tests.ops.cases import DTYPES, HIDDEN_SIZES, LAYOUTS, make_sources, make_vector, make_weights


def merge(
    module: Any,
    out: Any,
    lse: Any,
    partial: Any,
    delta: Any,
    query: Any,
    key_weight: Any = None,
    **o: Any,
) -> Any:
    return module.merge_partial(out, lse, partial, delta, query, key_weight, **o)


def exactly(arguments: Any) -> Any:
    """The definition in float64, with the one rounding that is part of it: the new partial's."""
    if arguments["partial"] is None or arguments["delta"] is None:
        return merge
    rounded = reference.add_to_partial(arguments["partial"], arguments["delta"]).double()

    def function(
        module: Any,
        out: Any,
        lse: Any,
        partial: Any,
        delta: Any,
        query: Any,
        key_weight: Any = None,
        **o: Any,
    ) -> Any:
        new = reference.add_to_partial(partial, delta)
        new = new + (rounded - new).detach()
        return module.merge_partial(out, lse, new, None, query, key_weight, **o)

    return function


def check_merge(
    out: Tensor,
    lse: Tensor,
    partial: Tensor | None,
    delta: Tensor | None,
    *,
    frozen: Any = (),
    **arguments: Any,
) -> dict[str, Tensor | None]:
    arguments = {"out": out, "lse": lse, "partial": partial, "delta": delta, **arguments}
    results = check(merge, arguments, exact=exactly, frozen=frozen)
    if partial is not None and delta is not None:
        expected = reference.add_to_partial(partial, delta)
        assert_same_bits("new partial", results["output 1"], expected)
    return results


def make_state(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``lse``, ``partial``, ``delta``."""
    out, partial, delta = make_sources(3, shape, dtype=dtype, layout=layout, device=device)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return out, 2 * torch.randn(shape[:-1], dtype=compute, device=device), partial, delta


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
def test_matches_definition(device: str, dtype: torch.dtype, hidden: int, norm: bool) -> None:
    state = make_state((3, hidden), dtype=dtype, device=device)
    check_merge(*state, **make_weights(hidden, device=device, norm=norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    state = make_state((2, 4, 40), dtype=dtype, device=device, layout=layout)
    check_merge(*state, **make_weights(40, device=device))


def test_rows_of_phase_one(device: str) -> None:
    """``out`` and ``lse`` are views of phase 1's results, the lse strided."""
    out, partial, delta = make_sources(3, (2, 4, 40), device=device)
    stack = torch.stack([torch.zeros_like(out), out])
    lse = torch.randn(4, 2, 5, device=device)[:, :, 3].t()
    check_merge(stack[1], lse, partial, delta, **make_weights(40, device=device))
    check_merge(
        out,
        torch.randn((), device=device).expand(2, 4),
        partial,
        delta,
        **make_weights(40, device=device),
    )


@pytest.mark.parametrize(
    ("out_dtype", "partial_dtype", "delta_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float64, torch.float32),
    ],
)
def test_mixed_dtypes(
    device: str, out_dtype: torch.dtype, partial_dtype: torch.dtype, delta_dtype: torch.dtype
) -> None:
    out, partial, delta = make_sources(
        3, (3, 33), dtype=(out_dtype, partial_dtype, delta_dtype), device=device
    )
    lse = torch.randn(3, device=device)
    results = check_merge(out, lse, partial, delta, **make_weights(33, device=device))
    assert results["output 0"].dtype == torch.promote_types(out_dtype, partial_dtype)
    assert results["output 1"].dtype == partial_dtype


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_sublayer_of_a_block(device: str, dtype: torch.dtype, norm: bool) -> None:
    """Neither partial nor delta: the hidden state is phase 1's output, normalised when asked."""
    out, lse, _, _ = make_state((3, 24), dtype=dtype, device=device)
    weights = make_weights(24, device=device, norm=norm)
    hidden, new_partial = ops.merge_partial(out, lse, None, None, **weights)
    assert new_partial is None
    if not norm:
        assert_same_bits("hidden", hidden, out)
    frozen = ("lse", "query", "key_weight")  # nothing depends on them
    check_merge(out, lse, None, None, frozen=frozen, **weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_starts_the_partial(device: str, dtype: torch.dtype) -> None:
    out, lse, _, delta = make_state((3, 24), dtype=dtype, device=device)
    weights = make_weights(24, device=device)
    hidden, new_partial = ops.merge_partial(out, lse, None, delta, **weights)
    assert new_partial is delta
    also, _ = ops.merge_partial(out, lse, delta, None, **weights)
    assert_same_bits("hidden", hidden, also)

    def hidden_only(module: Any, **arguments: Any) -> Any:
        return merge(module, partial=None, **arguments)[0]

    check(hidden_only, {"out": out, "lse": lse, "delta": delta, **weights})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_without_delta(device: str, dtype: torch.dtype) -> None:
    def hidden_only(module: Any, **arguments: Any) -> Any:
        return merge(module, delta=None, **arguments)[0]

    out, lse, partial, _ = make_state((3, 24), dtype=dtype, device=device)
    weights = make_weights(24, device=device)
    check(hidden_only, {"out": out, "lse": lse, "partial": partial, **weights})
    _, new_partial = ops.merge_partial(out, lse, partial, None, **weights)
    assert_same_bits("new partial", new_partial, partial)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("garbage", [0.0, 1e30, float("nan"), float("inf")])
def test_empty_state_is_exact(device: str, norm: bool, garbage: float) -> None:
    """lse = -inf is no state at all: whatever ``out`` holds, the hidden state is the partial."""
    _, lse, partial, delta = make_state((3, 24), device=device)
    out = torch.full((3, 24), garbage, device=device)
    weights = make_weights(24, device=device, norm=norm)
    hidden, new_partial = ops.merge_partial(
        out, torch.full_like(lse, -torch.inf), partial, delta, **weights
    )
    expected, _ = ops.accumulate_depth_attention(partial, delta, [], **weights)
    assert_same_bits("new partial", new_partial, partial + delta)
    assert_same_bits("hidden", hidden, expected)


def test_empty_state_alone_is_returned(device: str) -> None:
    """Without anything to merge the state is all there is, whatever its log-sum-exp."""
    out = torch.randn(4, 24, device=device)
    lse = torch.full((4,), -torch.inf, device=device)
    hidden, partial = ops.merge_partial(out, lse, None, None, torch.zeros(24, device=device))
    assert partial is None
    assert_same_bits("hidden", hidden, out)


def test_empty_state_has_finite_gradients(device: str) -> None:
    out, lse, partial, delta = make_state((3, 24), device=device)
    lse[1] = -torch.inf
    arguments = {
        "out": out,
        "lse": lse,
        "partial": partial,
        "delta": delta,
        **make_weights(24, device=device),
    }
    results, _ = evaluate(merge, ops, arguments)
    for value in results.values():
        assert value.isfinite().all()
    assert (results["gradient of out"][1] == 0).all()
    assert results["gradient of lse"][1] == 0
    full, _ = evaluate(merge, ops, {**arguments, "lse": lse.nan_to_num(neginf=0.0)})
    for name in ("output 0", "gradient of out", "gradient of partial", "gradient of delta"):
        assert_same_bits(name, results[name][[0, 2]], full[name][[0, 2]])


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(device: str, size: float) -> None:
    out, _, partial, delta = make_state((3, 64), device=device)
    lse = torch.tensor([1e4, -1e4, 0.0], device=device)
    query = size / 8 * torch.nn.functional.normalize(partial[0] + delta[0], dim=0)
    results = check_merge(out, lse, partial, delta, query=query)
    for value in results.values():
        assert value.isfinite().all()


@pytest.mark.parametrize("logit", [2.0**10, 2.0**16, 2.0**20])
def test_large_tied_logits(device: str, logit: float) -> None:
    """Two phases lose of a weight what one float32 loses of lse; one pass loses nothing."""
    # Rows of one length and one first column, which is all that the query sees.
    signs = torch.randint(0, 2, (4, 5, 64), device=device) * 2.0 - 1
    signs[..., 0] = 1
    sources = list(signs)
    query = torch.zeros(64, device=device)
    query[0] = logit
    options: dict[str, Any] = {"eps": 0.0}
    mean = signs.double().mean(0).float()
    one_pass = ops.depth_attention(sources, query, **options)
    torch.testing.assert_close(one_pass, mean, rtol=0, atol=2**-22)
    out, lse = ops.inter_block_attention(sources[:3], query[None], **options)
    hidden, _ = ops.merge_partial(out[0], lse[0], None, sources[3], query, **options)
    # p (1 - p) of half a unit in the last place of a number in [logit, 2 logit); rows differ by 2.
    lost = 3 / 16 * logit * 2**-24 * 2
    torch.testing.assert_close(hidden, mean, rtol=0, atol=lost + 2**-22)


@pytest.mark.parametrize("used", ["hidden", "partial"])
def test_one_output_used(device: str, used: str) -> None:
    def one(module: Any, **arguments: Any) -> Any:
        return merge(module, **arguments)[0 if used == "hidden" else 1]

    out, lse, partial, delta = make_state((3, 24), device=device)
    arguments = {
        "out": out,
        "lse": lse,
        "partial": partial,
        "delta": delta,
        **make_weights(24, device=device),
    }
    results, _ = evaluate(one, ops, arguments)
    plain, _ = evaluate(one, reference, arguments)
    for name, value in plain.items():
        if value is None:  # unused: None or zeros, both mean no gradient
            assert results[name] is None or (results[name] == 0).all()
        else:
            torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "frozen",
    [
        ("out", "lse"),
        ("lse",),
        ("partial",),
        ("delta",),
        ("partial", "delta"),
        ("query", "key_weight", "out_weight"),
        ("out", "lse", "partial", "delta"),
    ],
)
def test_frozen_inputs(device: str, frozen: tuple[str, ...]) -> None:
    out, lse, partial, delta = make_state((3, 24), device=device)
    weights = make_weights(24, device=device)
    every = check_merge(out, lse, partial, delta, **weights)
    some = check_merge(out, lse, partial, delta, frozen=frozen, **weights)
    for name, value in some.items():
        assert_same_bits(name, value, every[name])


@pytest.mark.parametrize("scale", [0.125, -2.0])
@pytest.mark.parametrize(("eps", "out_eps"), [(1e-5, 1e-2), (0.5, None)])
def test_scale_and_eps(device: str, scale: float, eps: float, out_eps: float | None) -> None:
    state = make_state((4, 24), device=device)
    check_merge(*state, scale=scale, eps=eps, out_eps=out_eps, **make_weights(24, device=device))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (24, 1)])
def test_query_shapes(device: str, shape: tuple[int, ...]) -> None:
    weights = make_weights(24, dtype=torch.bfloat16, device=device)
    weights["query"] = weights["query"].reshape(shape)
    check_merge(*make_state((4, 24), dtype=torch.bfloat16, device=device), **weights)


@pytest.mark.parametrize("shape", [(0, 17), (2, 0, 17)])
def test_no_tokens(device: str, shape: tuple[int, ...]) -> None:
    results = check_merge(*make_state(shape, device=device), **make_weights(17, device=device))
    assert (results["gradient of query"] == 0).all()


@pytest.mark.parametrize("where", ["out", "lse", "partial", "delta"])
def test_bad_rows_stay_in_their_row(device: str, where: str) -> None:
    out, lse, partial, delta = make_state((6, 40), dtype=torch.bfloat16, device=device)
    arguments = {
        "out": out,
        "lse": lse,
        "partial": partial,
        "delta": delta,
        **make_weights(40, device=device),
    }
    clean, _ = evaluate(merge, ops, arguments)
    arguments[where][3] = torch.nan
    dirty, _ = evaluate(merge, ops, arguments)
    others = [0, 1, 2, 4, 5]
    assert not dirty["output 0"][3].isfinite().any()
    for name in clean:
        if not name.endswith(("query", "_weight")):
            assert_same_bits(name, dirty[name][others], clean[name][others])


# ---- two phases equal one pass


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_phases_equal_one_pass(device: str, dtype: torch.dtype, norm: bool) -> None:
    """Exactly one softmax over all sources, not an approximation (paper, Algorithm 1).

    Two phases round phase 1's output to the storage dtype once more than one pass does: that
    rounding is the budget.
    """
    partial, delta, *blocks = make_sources(6, (3, 40), dtype=dtype, device=device)
    weights = make_weights(40, device=device, norm=norm)
    out, lse = ops.inter_block_attention(
        blocks, weights["query"][None], weights["key_weight"][None]
    )
    two, new_two = ops.merge_partial(out[0], lse[0], partial, delta, **weights)
    one, new_one = ops.accumulate_depth_attention(partial, delta, blocks, **weights)
    assert_same_bits("new partial", new_one, new_two)
    eps = torch.finfo(dtype).eps
    largest = one.abs().max().item()
    slack = 8 if dtype in (torch.float32, torch.float64) else 2
    torch.testing.assert_close(two, one, rtol=0, atol=slack * eps * largest)

    first, _ = ops.merge_partial(out[0], lse[0], None, None, **weights)
    alone = ops.depth_attention(blocks, **weights)
    torch.testing.assert_close(first, alone, rtol=0, atol=slack * eps * alone.abs().max().item())


def test_two_phases_have_the_same_gradients(device: str) -> None:
    def one_pass(module: Any, partial: Any, delta: Any, blocks: Any, **weights: Any) -> Any:
        return module.accumulate_depth_attention(partial, delta, blocks, **weights)

    def two_phases(
        module: Any,
        partial: Any,
        delta: Any,
        blocks: Any,
        query: Any,
        key_weight: Any,
        out_weight: Any,
    ) -> Any:
        out, lse = module.inter_block_attention(blocks, query[None], key_weight[None])
        return module.merge_partial(
            out[0], lse[0], partial, delta, query, key_weight, out_weight=out_weight
        )

    partial, delta, *blocks = make_sources(6, (3, 40), dtype=torch.float64, device=device)
    arguments = {
        "partial": partial,
        "delta": delta,
        "blocks": blocks,
        **make_weights(40, dtype=torch.float64, device=device),
    }
    one, _ = evaluate(one_pass, ops, arguments)
    two, _ = evaluate(two_phases, ops, arguments)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-11, atol=1e-12)
    check(two_phases, arguments)


def test_merging_one_by_one_equals_one_pass(device: str) -> None:
    """Any split of the sources into states gives the same softmax."""
    sources = make_sources(5, (3, 40), dtype=torch.float64, device=device)
    query = make_vector(40, dtype=torch.float64, device=device)
    expected = ops.depth_attention(sources, query)
    for split in range(1, 5):
        out, lse = ops.inter_block_attention(sources[:split], query[None])
        hidden, done = out[0], lse[0]
        for source in sources[split:]:
            _, score = ops.inter_block_attention([source], query[None])
            hidden, _ = ops.merge_partial(hidden, done, source, None, query)
            done = torch.logaddexp(done, score[0])
        torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-13)
