"""fast-attnres: Triton kernels on a list of bfloat16 sources."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..inputs import EPS, Inputs
from ..registry import Case
from . import packages

ABOUT = "attnres.attnres of fast-attnres, with weights in bfloat16 as it wants them"

#: Its queries are bfloat16: it is held to what the definition makes of such weights.
WEIGHT_DTYPE = torch.bfloat16

_MOST_SOURCES, _MOST_HIDDEN = 129, 8192


def unavailable(device: str) -> str | None:
    """It needs the package and a GPU."""
    return packages.missing("fast-attnres", "attnres", device)


def unsupported(case: Case, device: str) -> str | None:
    """As the package checks its arguments."""
    if case.operator == "inter_block_attention":
        return "fast-attnres does not return the logarithms that phase 2 needs"
    if case.operator != "depth_attention" or case.norm:
        return "fast-attnres has no sum, no merge and no output norm"
    if case.dtype != "bfloat16":
        return "fast-attnres takes bfloat16 alone"
    if case.sources > _MOST_SOURCES or case.hidden > _MOST_HIDDEN:
        return f"fast-attnres takes at most {_MOST_SOURCES} sources of {_MOST_HIDDEN} values"
    return None


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """It has no gain, so that goes into the query."""
    from attnres import attnres

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        return (attnres(inputs.sources, inputs.query * inputs.key_weight, eps=EPS),)

    return call
