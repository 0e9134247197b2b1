"""The block cache operators: what they write in place, what they leave alone, what they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnres_ext
from attnres_ext import reference
from tests.helpers import assert_as_good_as, assert_same_bits
from tests.ops.cases import make_sources, make_weights

CAPACITY, TOKENS, HIDDEN = 5, 6, 40
EPS, OUT_EPS, SCALE = 1e-5, 1e-3, 0.75
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def cache() -> Any:
    return torch.ops.attnres


def make_cache(
    filled: int, dtype: torch.dtype, device: str, *, hidden: int = HIDDEN, tokens: int = TOKENS
) -> tuple[Tensor, Tensor]:
    """Slots 0 .. filled - 1 written through the operator, everything else NaN."""
    slots = torch.full((CAPACITY, tokens, hidden), torch.nan, dtype=dtype, device=device)
    compute = torch.promote_types(dtype, torch.float32)
    rstd = torch.full((CAPACITY, tokens), torch.nan, dtype=compute, device=device)
    for slot in range(filled):
        delta = torch.randn(tokens, hidden, dtype=dtype, device=device)
        cache().block_cache_write(slots, rstd, delta, slot, False, EPS)
    return slots, rstd


def exact_rstd(values: Tensor) -> Tensor:
    compute = torch.promote_types(values.dtype, torch.float32)
    return torch.rsqrt(values.double().square().mean(-1) + EPS).to(compute)


def assert_cache_is(slots: Tensor, rstd: Tensor, expected: Tensor, filled: int) -> None:
    assert_same_bits("slots", slots, expected)
    assert rstd[filled:].isnan().all()
    assert expected[filled:].isnan().all()
    exact = exact_rstd(expected[:filled])
    torch.testing.assert_close(rstd[:filled], exact, rtol=8 * torch.finfo(exact.dtype).eps, atol=0)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 17, 40, 100])
def test_write(device: str, dtype: torch.dtype, hidden: int, add: bool) -> None:
    slots, rstd = make_cache(3, dtype, device, hidden=hidden)
    delta = torch.randn(TOKENS, hidden, dtype=dtype, device=device)
    expected = slots.clone()
    expected[2] = reference.add_to_partial(slots[2], delta) if add else delta
    assert cache().block_cache_write(slots, rstd, delta, 2, add, EPS) is None
    assert_cache_is(slots, rstd, expected, 3)


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_of_another_dtype(device: str, delta_dtype: torch.dtype) -> None:
    slots, rstd = make_cache(2, torch.bfloat16, device)
    delta = torch.randn(TOKENS, HIDDEN, device=device).to(delta_dtype)
    expected = slots.clone()
    expected[1] = reference.add_to_partial(slots[1], delta)
    cache().block_cache_write(slots, rstd, delta, 1, True, EPS)
    assert_cache_is(slots, rstd, expected, 2)
    expected[2] = delta.to(torch.bfloat16)
    cache().block_cache_write(slots, rstd, delta, 2, False, EPS)
    assert_cache_is(slots, rstd, expected, 3)


@pytest.mark.parametrize(
    "layout", ["padded_rows", "unaligned", "transposed", "strided_inside", "expanded"]
)
def test_write_of_any_layout(device: str, layout: str) -> None:
    """Deltas come with leading dimensions and strides of their own: M rows in all."""
    slots, rstd = make_cache(1, torch.float32, device)
    (delta,) = make_sources(1, (2, 3, HIDDEN), layout=layout, device=device)
    expected = slots.clone()
    expected[0] += delta.reshape(TOKENS, HIDDEN)
    cache().block_cache_write(slots, rstd, delta, 0, True, EPS)
    assert_cache_is(slots, rstd, expected, 1)


@pytest.mark.parametrize("strided", ["capacity", "rows"])
def test_strided_slots(device: str, strided: str) -> None:
    big = torch.full((2 * CAPACITY, TOKENS, 2 * HIDDEN), torch.nan, device=device)
    slots = (
        big[::2, :, :HIDDEN]
        if strided == "rows"
        else big.view(CAPACITY, 2, TOKENS, -1)[:, 0, :, :HIDDEN]
    )
    rstd = torch.full((CAPACITY, TOKENS), torch.nan, device=device)
    delta = torch.randn(TOKENS, HIDDEN, device=device)
    cache().block_cache_write(slots, rstd, delta, 3, False, EPS)
    assert_same_bits("slot", slots[3], delta)
    assert int(big.isfinite().sum()) == delta.numel()


def attend(
    slots: Tensor,
    rstd: Tensor,
    delta: Tensor | None,
    slot: int,
    add: bool,
    weights: dict[str, Any],
    out: Tensor,
) -> None:
    cache().block_cache_attend(
        slots,
        rstd,
        delta,
        slot,
        add,
        weights["query"],
        weights.get("key_weight"),
        weights.get("out_weight"),
        EPS,
        OUT_EPS,
        SCALE,
        out,
    )


def assert_attends(name: str, out: Tensor, sources: Tensor, weights: dict[str, Any]) -> None:
    """``out`` is depth attention over the rows of ``sources`` ``[n, M, D]``."""
    options = {"eps": EPS, "out_eps": OUT_EPS, "scale": SCALE}
    plain = reference.depth_attention(list(sources), **weights, **options)
    wide = {n: w.double() for n, w in weights.items()}
    exact = reference.depth_attention(list(sources.double()), **wide, **options)
    assert_as_good_as(name, out.reshape(plain.shape), plain, exact, terms=sources.shape[-1])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("slot", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend(device: str, dtype: torch.dtype, slot: int, add: bool, norm: bool) -> None:
    """One call adds the delta, keeps the slot's 1/rms, and attends over it and all before it."""
    slots, rstd = make_cache(slot + 1 if add else slot, dtype, device)
    weights = make_weights(HIDDEN, device=device, norm=norm)
    delta = torch.randn(TOKENS, HIDDEN, dtype=dtype, device=device)
    expected = slots.clone()
    expected[slot] = reference.add_to_partial(slots[slot], delta) if add else delta
    out = torch.full((TOKENS, HIDDEN), torch.nan, dtype=dtype, device=device)
    attend(slots, rstd, delta, slot, add, weights, out)
    assert_cache_is(slots, rstd, expected, slot + 1)
    assert_attends("out", out, expected[: slot + 1], weights)


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_without_a_delta(device: str, dtype: torch.dtype, slot: int) -> None:
    """Nothing is written but the output, and 1/rms is read, not computed again."""
    slots, rstd = make_cache(slot + 1, dtype, device)
    weights = make_weights(HIDDEN, device=device)
    before, rstd_before = slots.clone(), rstd.clone()
    out = torch.full((TOKENS, HIDDEN), torch.nan, dtype=dtype, device=device)
    attend(slots, rstd, None, slot, False, weights, out)
    assert_same_bits("slots", slots, before)
    assert_same_bits("rstd", rstd, rstd_before)
    assert_attends("out", out, slots[: slot + 1], weights)

    rstd[: slot + 1] *= 0  # all logits are 0 then, and the mix is the mean
    attend(slots, rstd, None, slot, False, {"query": weights["query"]}, out)
    mean = slots[: slot + 1].to(rstd.dtype).mean(0).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, mean, rtol=eps, atol=eps)


def test_attend_equals_accumulate(device: str) -> None:
    """The cached path and the training path agree bit for bit where 1/rms is computed afresh."""
    slots, rstd = make_cache(1, torch.bfloat16, device)
    weights = make_weights(HIDDEN, device=device)
    delta = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
    out = torch.empty(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)
    hidden, partial = attnres_ext.accumulate_depth_attention(
        slots[0].clone(), delta, [], **weights, eps=EPS, out_eps=OUT_EPS, scale=SCALE
    )
    attend(slots, rstd, delta, 0, True, weights, out)
    assert_same_bits("partial", slots[0], partial)
    assert_same_bits("out", out, hidden)


def test_output_dtype_and_layout(device: str) -> None:
    """The output keeps its own dtype, leading dimensions and row stride."""
    slots, rstd = make_cache(2, torch.bfloat16, device)
    weights = make_weights(HIDDEN, device=device)
    wide = torch.full((2, 3, HIDDEN + 4), torch.nan, device=device)
    attend(slots, rstd, None, 1, False, weights, wide[..., :HIDDEN])
    dense = torch.empty(TOKENS, HIDDEN, device=device)
    attend(slots, rstd, None, 1, False, weights, dense)
    assert_same_bits("out", wide[..., :HIDDEN].reshape(TOKENS, HIDDEN), dense)
    assert wide[..., HIDDEN:].isnan().all()


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inter(device: str, dtype: torch.dtype, count: int) -> None:
    """Phase 1 over the finished slots, with the 1/rms that was kept."""
    slots, rstd = make_cache(count, dtype, device)
    before = slots.clone()
    queries = torch.randn(3, HIDDEN, device=device) / 2
    gains = 1 + torch.randn(3, HIDDEN, device=device) / 5
    for key_weights in (None, gains):
        out = torch.full((3, TOKENS, HIDDEN), torch.nan, dtype=dtype, device=device)
        lse = torch.full((3, TOKENS), torch.nan, dtype=rstd.dtype, device=device)
        cache().block_cache_inter(slots, rstd, count, queries, key_weights, SCALE, out, lse)
        assert_same_bits("slots", slots, before)
        plain = reference.inter_block_attention(
            list(slots[:count]), queries, key_weights, eps=EPS, scale=SCALE
        )
        exact = reference.inter_block_attention(
            list(slots[:count].double()),
            queries.double(),
            None if key_weights is None else gains.double(),
            eps=EPS,
            scale=SCALE,
        )
        assert_as_good_as("out", out, plain[0], exact[0], terms=HIDDEN)
        assert_as_good_as("lse", lse, plain[1], exact[1], terms=HIDDEN)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(device: str, dtype: torch.dtype, add: bool, norm: bool) -> None:
    """Phase 2: the write to the open slot, and the merge of it with phase 1's result."""
    slots, rstd = make_cache(3 if add else 2, dtype, device)
    weights = make_weights(HIDDEN, device=device, norm=norm)
    delta = torch.randn(TOKENS, HIDDEN, dtype=dtype, device=device)
    state = torch.randn(TOKENS, HIDDEN, dtype=dtype, device=device)
    lse = torch.randn(TOKENS, device=device)
    expected = slots.clone()
    expected[2] = reference.add_to_partial(slots[2], delta) if add else delta
    hidden = torch.full((TOKENS, HIDDEN), torch.nan, dtype=dtype, device=device)
    key_weight, out_weight = weights["key_weight"], weights.get("out_weight")
    cache().block_cache_merge(
        slots, rstd, state, lse, delta, 2, add,
        weights["query"], key_weight, out_weight, EPS, OUT_EPS, SCALE, hidden,
    )  # fmt: skip
    assert_cache_is(slots, rstd, expected, 3)
    options = {"eps": EPS, "out_eps": OUT_EPS, "scale": SCALE}
    plain, _ = reference.merge_partial(state, lse, expected[2], None, **weights, **options)
    wide = {n: w.double() for n, w in weights.items()}
    exact, _ = reference.merge_partial(
        state.double(), lse.double(), expected[2].double(), None, **wide, **options
    )
    assert_as_good_as("hidden", hidden, plain, exact, terms=HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_in_place(device: str, dtype: torch.dtype) -> None:
    """Blocks of three sublayers, single pass and two phases, against plain lists of tensors."""
    two_slots, two_rstd = make_cache(1, dtype, device)
    one_slots, one_rstd = two_slots.clone(), two_rstd.clone()
    blocks, partial = [one_slots[0].clone()], None
    out = torch.empty(TOKENS, HIDDEN, dtype=dtype, device=device)
    hidden = torch.empty_like(out)
    phase1 = torch.empty(1, TOKENS, HIDDEN, dtype=dtype, device=device)
    lse = torch.empty(1, TOKENS, device=device)
    for sublayer in range(9):
        weights = make_weights(HIDDEN, device=device)
        delta = torch.randn(TOKENS, HIDDEN, dtype=dtype, device=device)
        slot, add = 1 + sublayer // 3, sublayer % 3 > 0
        attend(one_slots, one_rstd, delta, slot, add, weights, out)
        cache().block_cache_inter(
            two_slots,
            two_rstd,
            slot,
            weights["query"][None],
            weights["key_weight"][None],
            SCALE,
            phase1,
            lse,
        )
        cache().block_cache_merge(
            two_slots, two_rstd, phase1[0], lse[0], delta, slot, add, weights["query"],
            weights["key_weight"], weights["out_weight"], EPS, OUT_EPS, SCALE, hidden,
        )  # fmt: skip
        plain, partial = reference.accumulate_depth_attention(
            partial, delta, blocks, **weights, eps=EPS, out_eps=OUT_EPS, scale=SCALE
        )
        assert_same_bits("open slot", one_slots[slot], partial)
        assert_same_bits("slots", one_slots, two_slots)
        assert_attends("out", out, one_slots[: slot + 1], weights)
        slack = 4 * torch.finfo(dtype).eps * plain.abs().max().item()
        torch.testing.assert_close(hidden, plain, rtol=0, atol=slack)
        if sublayer % 3 == 2:
            blocks, partial = [*blocks, partial], None


def test_no_tokens(device: str) -> None:
    slots, rstd = make_cache(0, torch.float32, device, tokens=0)
    delta = torch.empty(0, HIDDEN, device=device)
    weights = make_weights(HIDDEN, device=device)
    cache().block_cache_write(slots, rstd, delta, 0, False, EPS)
    attend(slots, rstd, delta, 0, True, weights, torch.empty(0, HIDDEN, device=device))


def test_bad_rows_stay_in_their_row(device: str) -> None:
    slots, rstd = make_cache(3, torch.float32, device)
    weights = make_weights(HIDDEN, device=device)
    delta = torch.randn(TOKENS, HIDDEN, device=device)
    outs = []
    for bad in (False, True):
        these, those = slots.clone(), rstd.clone()
        change = delta.clone()
        if bad:
            change[4, 7] = torch.inf
        out = torch.empty(TOKENS, HIDDEN, device=device)
        attend(these, those, change, 2, True, weights, out)
        outs.append(out)
    others = [0, 1, 2, 3, 5]
    assert_same_bits("out", outs[0][others], outs[1][others])
    assert not outs[1][4].isfinite().any()


@pytest.mark.skipif(not hasattr(torch, "inference_mode"), reason="needs inference mode")
def test_inference_mode(device: str) -> None:
    with torch.inference_mode():
        slots, rstd = make_cache(2, torch.float32, device)
        out = torch.empty(TOKENS, HIDDEN, device=device)
        weights = make_weights(HIDDEN, device=device)
        attend(slots, rstd, torch.randn(TOKENS, HIDDEN, device=device), 1, True, weights, out)
        assert out.isfinite().all()


# ---- errors: a sentence, and nothing written


def arguments(op: str) -> dict[str, Any]:
    """A legal call of each operator."""
    slots, rstd = make_cache(3, torch.float32, "cpu")
    delta = torch.randn(TOKENS, HIDDEN)
    query = torch.randn(HIDDEN)
    read = {"key_weight": None, "out_weight": None, "eps": EPS, "out_eps": None, "scale": 1.0}
    write = {"slots": slots, "rstd": rstd, "delta": delta, "slot": 2, "add": True}
    if op == "block_cache_write":
        return {**write, "eps": EPS}
    if op == "block_cache_attend":
        return {**write, "query": query, **read, "out": torch.randn(TOKENS, HIDDEN)}
    if op == "block_cache_inter":
        return {
            "slots": slots,
            "rstd": rstd,
            "count": 3,
            "queries": torch.randn(2, HIDDEN),
            "key_weights": None,
            "scale": 1.0,
            "out": torch.randn(2, TOKENS, HIDDEN),
            "lse": torch.randn(2, TOKENS),
        }
    state = {"out": torch.randn(TOKENS, HIDDEN), "lse": torch.randn(TOKENS)}
    return {**write, **state, "query": query, **read, "hidden": torch.randn(TOKENS, HIDDEN)}


WRITERS = ["block_cache_write", "block_cache_attend", "block_cache_merge"]
READERS = ["block_cache_attend", "block_cache_merge"]
ALL = [*WRITERS, "block_cache_inter"]
WRONG = [
    (ALL, {"slots": torch.zeros(5, HIDDEN)}, ("slots", "[5, 40]", "[capacity, M, D]")),
    (ALL, {"slots": torch.zeros(5, 6, 40, dtype=torch.int32)}, ("slots", "dtype")),
    (ALL, {"rstd": torch.zeros(5, 5)}, ("rstd", "[5, 5]", "[5, 6]")),
    (ALL, {"rstd": torch.zeros(5, 6, dtype=torch.float64)}, ("rstd", "Float tensor for slots")),
    (WRITERS, {"delta": torch.zeros(6, 40, dtype=torch.float64)}, ("delta", "Double", "Float")),
    (WRITERS, {"slot": 5}, ("slot", "5", "0 to 4")),
    (WRITERS, {"slot": -1}, ("slot", "-1", "0 to 4")),
    (WRITERS, {"delta": torch.zeros(5, HIDDEN)}, ("delta", "[5, 40]")),
    (WRITERS, {"delta": torch.zeros(6, 39)}, ("delta", "[6, 39]")),
    (WRITERS, {"delta": torch.zeros(6, 40, dtype=torch.int32)}, ("delta", "dtype")),
    (WRITERS, {"eps": -1.0}, ("eps", "-1")),
    (READERS, {"query": torch.zeros(39)}, ("query", "[39]", "[40]")),
    (READERS, {"key_weight": torch.zeros(1)}, ("key_weight", "[1]", "[40]")),
    (READERS, {"out_weight": torch.zeros(2, 40)}, ("out_weight", "[2, 40]", "[40]")),
    (READERS, {"out_eps": -1.0}, ("out_eps", "-1")),
    (["block_cache_attend"], {"out": torch.zeros(5, HIDDEN)}, ("out", "[5, 40]")),
    (["block_cache_attend"], {"out": torch.zeros(6, 80)[:, ::2]}, ("out", "contiguous")),
    (["block_cache_attend"], {"out": torch.zeros(1, 40).expand(6, 40)}, ("out",)),
    (["block_cache_merge"], {"hidden": torch.zeros(6, 41)}, ("hidden", "[6, 41]")),
    (["block_cache_merge"], {"lse": torch.zeros(5)}, ("lse", "[5]")),
    (["block_cache_merge"], {"out": torch.zeros(5, 40)}, ("out", "[5, 40]")),
    (["block_cache_inter"], {"count": 0}, ("count", "0", "1 to 5")),
    (["block_cache_inter"], {"count": 6}, ("count", "6", "1 to 5")),
    (["block_cache_inter"], {"queries": torch.zeros(2, 39)}, ("queries", "[2, 39]")),
    (["block_cache_inter"], {"key_weights": torch.zeros(3, 40)}, ("key_weights", "[3, 40]")),
    (["block_cache_inter"], {"out": torch.zeros(2, 6, 41)}, ("out", "[2, 6, 41]")),
    (["block_cache_inter"], {"lse": torch.zeros(2, 5)}, ("lse", "[2, 5]")),
]
CASES = [
    pytest.param(op, change, words, id=f"{op}-{'-'.join(words)}")
    for ops, change, words in WRONG
    for op in ops
]


@pytest.mark.parametrize(("op", "change", "words"), CASES)
def test_errors(op: str, change: dict[str, Any], words: tuple[str, ...]) -> None:
    call = {**arguments(op), **change}
    before = {n: v.clone() for n, v in call.items() if isinstance(v, Tensor)}
    with pytest.raises(RuntimeError) as caught:
        getattr(cache(), op)(**call)
    for word in (op, *words):
        assert word in str(caught.value)
    for name, value in before.items():
        assert_same_bits(name, call[name], value)


@pytest.mark.parametrize(
    ("op", "written", "read"),
    [
        ("block_cache_write", "slots", "delta"),
        ("block_cache_attend", "out", "slots"),
        ("block_cache_attend", "out", "delta"),
        ("block_cache_attend", "slots", "delta"),
        ("block_cache_merge", "hidden", "slots"),
        ("block_cache_merge", "hidden", "out"),
        ("block_cache_merge", "hidden", "delta"),
        ("block_cache_merge", "slots", "out"),
    ],
)
def test_overlap(op: str, written: str, read: str) -> None:
    call = arguments(op)
    if "slots" in (written, read):
        call[read if written == "slots" else written] = call["slots"][1]
    else:
        call[written] = call[read]
    before = {n: v.clone() for n, v in call.items() if isinstance(v, Tensor)}
    with pytest.raises(RuntimeError, match="shares memory") as caught:
        getattr(cache(), op)(**call)
    assert op in str(caught.value)
    for name, value in before.items():
        assert_same_bits(name, call[name], value)
