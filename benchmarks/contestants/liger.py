"""Liger-Kernel: ``liger_attn_res`` on stacked sources."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..inputs import EPS, Inputs
from ..registry import Case
from . import packages

ABOUT = "liger_kernel.transformers.functional.liger_attn_res; stacking its sources is part of it"

#: Beyond as many sources its kernel leaves some out.
_MOST_SOURCES = 32


def unavailable(device: str) -> str | None:
    """It needs the package and a GPU."""
    return packages.missing("liger-kernel", "liger_kernel.transformers.functional", device)


def unsupported(case: Case, device: str) -> str | None:
    """One query, no output norm."""
    if case.operator != "depth_attention" or case.norm:
        return "liger_attn_res has one query and no output norm"
    if case.sources > _MOST_SOURCES:
        return f"liger_attn_res takes at most {_MOST_SOURCES} sources"
    return None


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Models hold their sources apart, so the stack that it wants is made in the call."""
    from liger_kernel.transformers.functional import liger_attn_res

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        stacked = torch.stack(inputs.sources).unsqueeze(1)  # [N, 1, M, D]
        return (liger_attn_res(stacked, inputs.query, inputs.key_weight, EPS).squeeze(0),)

    return call
