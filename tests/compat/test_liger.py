"""``compat.liger.liger_attn_res`` against its semantics, and the rounding it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext.compat import LigerAttnRes, liger_attn_res
from tests.helpers import assert_as_good_as, evaluate
from tests.ops.cases import make_sources, make_weights


class _RoundTo(torch.autograd.Function):
    """Rounds forward; backward does not differentiate the rounding, as Liger's does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def plain(
    V: Any,  # noqa: N803
    w_query: Tensor,
    w_norm: Tensor,
    eps: float = 1e-6,
    *,
    key_dtype: Any = None,
) -> Tensor:
    """Liger's semantics; keys are rounded to ``key_dtype`` before and after the gain."""
    dtype = V[0].dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.stack(list(V)).to(compute)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    if key_dtype is not None:
        keys = _RoundTo.apply(_RoundTo.apply(keys, key_dtype) * w_norm.to(compute), key_dtype)
    else:
        keys = keys * w_norm.to(compute)
    alpha = torch.softmax((keys * w_query.to(compute)).sum(-1), dim=0)
    return (alpha.unsqueeze(-1) * values).sum(0).to(dtype)


def call(module: Any, **arguments: Any) -> Any:
    return module(**arguments)


def make(
    dtype: torch.dtype, weight_dtype: torch.dtype, device: str, *, stacked: bool
) -> dict[str, Any]:
    weights = make_weights(40, dtype=weight_dtype, device=device)
    sources = make_sources(5, (2, 3, 40), dtype=dtype, device=device)
    return {
        "V": torch.stack(sources) if stacked else sources,
        "w_query": weights["query"],
        "w_norm": weights["key_weight"],
    }


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_semantics(device: str, dtype: torch.dtype, stacked: bool) -> None:
    """With a float32 gain Liger's rounding does nothing: the same numbers."""
    arguments = make(dtype, torch.float32, device, stacked=stacked)
    for eps in (1e-6, 1e-2):
        arguments["eps"] = eps
        actual, dtypes = evaluate(call, liger_attn_res, arguments)
        expected, _ = evaluate(
            call, plain, {**arguments, "key_dtype": torch.float32}, grad_dtypes=dtypes
        )
        exact, _ = evaluate(call, plain, arguments, dtype=torch.float64, grad_dtypes=dtypes)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_as_good_as(name, actual[name], value, exact[name], terms=6 * 5 * 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_keys_is_bounded(device: str, dtype: torch.dtype) -> None:
    """With a low-precision gain the two differ by what two roundings of the keys may cost."""
    arguments = make(dtype, dtype, device, stacked=True)
    ours = liger_attn_res(**arguments).double()
    liger = plain(**arguments, key_dtype=dtype).double()

    values = arguments["V"].double()
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6)
    unit = torch.finfo(dtype).eps / 2
    terms = (
        (keys * arguments["w_norm"].double() * arguments["w_query"].double()).abs().sum(-1)
    )  # [N, B, T]
    off = ((1 + unit) ** 2 - 1) * terms.max(0).values  # of any logit of a row
    alpha = torch.softmax(
        (keys * arguments["w_norm"].double() * arguments["w_query"].double()).sum(-1), dim=0
    )
    # Logits off by at most d change each softmax weight by a factor within exp(+-2d).
    bound = torch.expm1(2 * off).unsqueeze(-1) * (alpha.unsqueeze(-1) * values.abs()).sum(0)
    # Both round their output once; float32 arithmetic is far below that.
    bound = bound + 1.01 * torch.finfo(dtype).eps * torch.maximum(ours.abs(), liger.abs()) + 1e-5
    assert ((ours - liger).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_closer_to_the_definition_than_liger(device: str, dtype: torch.dtype) -> None:
    arguments = make(dtype, dtype, device, stacked=False)
    ours, dtypes = evaluate(call, liger_attn_res, arguments)
    liger, _ = evaluate(call, plain, {**arguments, "key_dtype": dtype}, grad_dtypes=dtypes)
    exact, _ = evaluate(call, plain, arguments, dtype=torch.float64, grad_dtypes=dtypes)
    for name, value in liger.items():
        assert ours[name].dtype == value.dtype
        assert_as_good_as(name, ours[name], value, exact[name], terms=6 * 5 * 40)


def test_more_sources_than_liger_takes(device: str) -> None:
    """Above 32 sources Liger once dropped the rest silently."""
    sources = make_sources(40, (3, 24), device=device)
    query, gain = torch.randn(24, device=device), torch.ones(24, device=device)
    torch.testing.assert_close(liger_attn_res(sources, query, gain), plain(sources, query, gain))


def test_errors() -> None:
    with pytest.raises(RuntimeError, match="V is empty, expected at least one source"):
        liger_attn_res([], torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize("stacked", [False, True])
def test_the_module_is_the_function_with_parameters(stacked: bool) -> None:
    module = LigerAttnRes(40, eps=1e-5, query_init_std=0.5)
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [
        ("w_query", (40,)), ("w_norm", (40,)),
    ]  # fmt: skip
    assert 0.3 < module.w_query.std() < 0.7
    assert (module.w_norm == 1).all()
    arguments = make(torch.float32, torch.float32, "cpu", stacked=stacked)
    module.load_state_dict({n: arguments[n] for n in ("w_query", "w_norm")})  # Liger's
    module(arguments["V"]).square().sum().backward()
    leaves = [arguments[n].clone().requires_grad_() for n in ("w_query", "w_norm")]
    out = liger_attn_res(arguments["V"], *leaves, eps=1e-5)
    out.square().sum().backward()
    assert torch.equal(module(arguments["V"]), out)
    for parameter, leaf in zip(module.parameters(), leaves, strict=True):
        assert torch.equal(parameter.grad, leaf.grad)
