"""``compat.vllm.attn_res`` against its semantics: what it returns, and what it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnres_ext.compat import attn_res
from tests.helpers import assert_as_good_as, assert_same_bits
from tests.ops.cases import make_weights

TOKENS, SLOTS, HIDDEN = 5, 4, 40


def plain(
    prefix: Tensor,
    delta: Tensor | None,
    blocks: Tensor,
    norm_weight: Tensor,
    qk_weight: Tensor,
    output_norm_weight: Tensor | None,
    num_blocks: int,
    block_write_idx: int,
    eps: float,
    output_norm_eps: float,
    *,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Add and round, file, attend in ``compute``, normalise; the caller rounds."""
    if delta is not None:
        prefix.copy_(prefix.float() + delta.float())
    if block_write_idx >= 0:
        blocks[:, block_write_idx] = prefix
    values = torch.cat(
        [blocks[:, :num_blocks].to(compute), prefix[:, None].to(compute)], dim=1
    )  # [T, N, H]
    rstd = torch.rsqrt(values.square().mean(-1) + eps)
    logits = (values * (norm_weight.to(compute) * qk_weight.to(compute))).sum(-1) * rstd
    mixed = (torch.softmax(logits, dim=1).unsqueeze(-1) * values).sum(1)
    if output_norm_weight is not None:
        norm = torch.rsqrt(mixed.square().mean(-1, keepdim=True) + output_norm_eps)
        mixed = mixed * norm * output_norm_weight.to(compute)
    return mixed


def make(
    dtype: torch.dtype, device: str, *, delta: bool = True, norm: bool = True
) -> dict[str, Any]:
    weights = make_weights(HIDDEN, dtype=dtype, device=device)
    return {
        "prefix": torch.randn(TOKENS, HIDDEN, dtype=dtype, device=device),
        "delta": torch.randn(TOKENS, HIDDEN, dtype=dtype, device=device) if delta else None,
        "blocks": torch.randn(TOKENS, SLOTS, HIDDEN, dtype=dtype, device=device),
        "norm_weight": weights["key_weight"],
        "qk_weight": weights["query"],
        "output_norm_weight": weights["out_weight"] if norm else None,
        "num_blocks": 3,
        "block_write_idx": -1,
        "eps": 1e-5,
        "output_norm_eps": 1e-3,
    }


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}


def check(arguments: dict[str, Any]) -> None:
    ours, theirs, exactly = (copied(arguments) for _ in range(3))
    hidden = attn_res(**ours)
    expected = plain(**theirs).to(arguments["prefix"].dtype)
    exact = plain(**exactly, compute=torch.float64)
    assert_as_good_as("hidden", hidden, expected, exact, terms=HIDDEN)
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert_same_bits(name, ours[name], value)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_semantics(device: str, dtype: torch.dtype, delta: bool, norm: bool) -> None:
    check(make(dtype, device, delta=delta, norm=norm))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("num_blocks", [0, 1, 4])
@pytest.mark.parametrize("block_write_idx", [-1, 0, 1, 3])
def test_blocks(device: str, num_blocks: int, block_write_idx: int, delta: bool) -> None:
    """A block written is a block attended, when it is among the attended."""
    arguments = make(torch.bfloat16, device, delta=delta)
    check({**arguments, "num_blocks": num_blocks, "block_write_idx": block_write_idx})


def test_mixed_dtypes_and_strides(device: str) -> None:
    arguments = make(torch.bfloat16, device)
    arguments["blocks"] = torch.randn(SLOTS, TOKENS, HIDDEN, device=device).transpose(0, 1)
    arguments["prefix"] = torch.randn(TOKENS, HIDDEN + 3, device=device).bfloat16()[:, 3:]
    arguments["delta"] = torch.randn(TOKENS, HIDDEN, device=device)
    check({**arguments, "block_write_idx": 3})


def test_no_tokens(device: str) -> None:
    arguments = make(torch.bfloat16, device)
    for name in ("prefix", "delta", "blocks"):
        arguments[name] = arguments[name][:0]
    assert attn_res(**arguments).shape == (0, HIDDEN)


def test_a_model_of_three_blocks(device: str) -> None:
    """The calls of a decoder: attention sites at block boundaries write, every other site adds."""
    ours, theirs = (make(torch.bfloat16, device) for _ in range(2))
    for name, value in ours.items():
        if isinstance(value, Tensor):
            theirs[name] = value.clone()
    for step in range(9):
        closes = step % 3 == 0
        delta = torch.randn(TOKENS, HIDDEN, device=device).bfloat16()
        for arguments in (ours, theirs):
            arguments.update(
                delta=delta, num_blocks=step // 3 + 1, block_write_idx=step // 3 if closes else -1
            )
        hidden = attn_res(**ours)
        torch.testing.assert_close(hidden, plain(**theirs).bfloat16())
        assert_same_bits("prefix", ours["prefix"], theirs["prefix"])
        assert_same_bits("blocks", ours["blocks"], theirs["blocks"])


def test_records_nothing_for_autograd() -> None:
    arguments = make(torch.float32, "cpu")
    arguments["qk_weight"].requires_grad_()
    assert not attn_res(**arguments).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 5}, "num_blocks is 5, expected 0 to 4"),
        ({"num_blocks": -1}, "num_blocks is -1, expected 0 to 4"),
        ({"block_write_idx": 4}, "block_write_idx is 4, expected less than 4"),
        ({"prefix": torch.zeros(40)}, r"prefix has shape \[40\], expected \[tokens, hidden\]"),
        ({"delta": torch.zeros(4, 40)}, r"delta has shape \[4, 40\], expected \[5, 40\]"),
        ({"delta": torch.zeros(5, 40, dtype=torch.int32)}, r"delta has dtype torch.int32"),
        (
            {"blocks": torch.zeros(4, 5, 40)},
            r"blocks has shape \[4, 5, 40\], expected \[5, slots, 40\]",
        ),
        ({"norm_weight": torch.zeros(39)}, r"norm_weight has shape \[39\], expected \[40\]"),
        ({"qk_weight": torch.zeros(1, 40)}, r"qk_weight has shape \[1, 40\], expected \[40\]"),
        ({"output_norm_weight": torch.zeros(0)}, r"output_norm_weight has shape \[0\]"),
        ({"qk_weight": torch.zeros(40, device="meta")}, "qk_weight is on meta, expected cpu"),
    ],
)
def test_errors_write_nothing(change: dict[str, Any], message: str) -> None:
    arguments = {**make(torch.float32, "cpu"), "block_write_idx": 3, **change}
    before = copied(arguments)
    with pytest.raises(RuntimeError, match=message):
        attn_res(**arguments)
    assert_same_bits("prefix", arguments["prefix"], before["prefix"])
    assert_same_bits("blocks", arguments["blocks"], before["blocks"])
