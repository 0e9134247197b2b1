"""flash-linear-attention's Triton kernels at the level that keeps the mix."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..inputs import Inputs
from ..registry import Case
from . import fla

ABOUT = "fla.ops.attnres.fused_attnres, Triton, checkpoint_level 0"


def unavailable(device: str) -> str | None:
    """It needs the package and a GPU."""
    return fla.missing(device)


def unsupported(case: Case, device: str) -> str | None:
    """As the package's interface has it."""
    return fla.unsupported(case)


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The mix is kept for the backward."""
    return fla.call(case, checkpoint_level=0)
