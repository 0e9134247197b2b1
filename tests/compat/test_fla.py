"""``compat.fla.fused_attnres`` against its documented semantics, written out in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext.compat import fused_attnres
from tests.helpers import assert_all_same_bits, assert_as_good_as, evaluate
from tests.ops.cases import make_sources, make_weights


def plain(
    query: Tensor,
    residuals: Any,
    rms_weight: Tensor,
    output_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale: float = 1.0,
    return_weights: bool = False,
    checkpoint_level: int = 1,
) -> Any:
    """Keys are RMS-normalised, everything is float32, one rounding at the end."""
    dtype = residuals[0].dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    shape = residuals[0].shape
    values = torch.stack([r.reshape(shape).to(compute) for r in residuals])
    rstd = torch.rsqrt(values.square().mean(-1) + rms_eps)
    direction = query.flatten().to(compute) * rms_weight.flatten().to(compute)
    weights = torch.softmax((values * direction).sum(-1) * rstd * scale, dim=0)
    mix = (weights.unsqueeze(-1) * values).sum(0)
    if output_rms_weight is not None:
        norm = torch.rsqrt(mix.square().mean(-1, keepdim=True) + rms_eps)
        mix = mix * norm * output_rms_weight.to(compute)
    return (mix.to(dtype), weights.detach()) if return_weights else mix.to(dtype)


def call(module: Any, **arguments: Any) -> Any:
    return module(**arguments)


def check(arguments: Any) -> None:
    actual, dtypes = evaluate(call, fused_attnres, arguments)
    expected, _ = evaluate(call, plain, arguments, grad_dtypes=dtypes)
    exact, _ = evaluate(call, plain, arguments, dtype=torch.float64, grad_dtypes=dtypes)
    assert actual.keys() == expected.keys()
    rows = actual["output 0"].numel() // actual["output 0"].shape[-1]
    for name, value in expected.items():
        assert_as_good_as(name, actual[name], value, exact[name], terms=rows * 5 * 40)


def make(
    dtype: torch.dtype, device: str, *, norm: bool = True, stacked: bool = False
) -> dict[str, Any]:
    weights = make_weights(40, dtype=dtype, device=device)
    sources = make_sources(5, (2, 3, 40), dtype=dtype, device=device)
    return {
        "query": weights["query"],
        "residuals": torch.stack(sources) if stacked else sources,
        "rms_weight": weights["key_weight"],
        "output_rms_weight": weights["out_weight"] if norm else None,
    }


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_semantics(device: str, dtype: torch.dtype, norm: bool, stacked: bool) -> None:
    arguments = make(dtype, device, norm=norm, stacked=stacked)
    check(arguments)
    check({**arguments, "scale": 0.25, "rms_eps": 1e-3})


@pytest.mark.parametrize("stacked", [False, True])
def test_returned_weights(device: str, stacked: bool) -> None:
    arguments = {**make(torch.bfloat16, device, stacked=stacked), "return_weights": True}
    check(arguments)
    arguments["query"] = arguments["query"].clone().requires_grad_()
    out, weights = fused_attnres(**arguments)
    assert out.requires_grad
    assert not weights.requires_grad
    assert weights.dtype == torch.float32
    assert weights.shape == (5, 2, 3)


def test_checkpoint_levels_agree(device: str) -> None:
    arguments = make(torch.bfloat16, device)
    zero, _ = evaluate(call, fused_attnres, {**arguments, "checkpoint_level": 0})
    one, _ = evaluate(call, fused_attnres, {**arguments, "checkpoint_level": 1})
    assert_all_same_bits(zero, one)


def test_shapes(device: str) -> None:
    """A query ``[D, 1]``, weights ``[1, D]``, and sources whose leading dimensions differ."""
    arguments = make(torch.float32, device)
    arguments["query"] = arguments["query"].reshape(40, 1)
    arguments["rms_weight"] = arguments["rms_weight"].reshape(1, 40)
    arguments["residuals"][2] = arguments["residuals"][2].reshape(6, 40)
    check(arguments)


def test_errors() -> None:
    arguments = make(torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="residuals is empty"):
        fused_attnres(**{**arguments, "residuals": []})
    with pytest.raises(RuntimeError, match="checkpoint_level is 2, expected 0 or 1"):
        fused_attnres(**arguments, checkpoint_level=2)
    with pytest.raises(RuntimeError, match=r"residuals\[1\] has shape \[4, 40\]"):
        fused_attnres(**{**arguments, "residuals": [arguments["residuals"][0], torch.randn(4, 40)]})
