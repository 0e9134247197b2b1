"""flash-linear-attention's Triton kernels at their default level."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..inputs import Inputs
from ..registry import Case
from . import fla

ABOUT = "fla.ops.attnres.fused_attnres, Triton, checkpoint_level 1 (its default)"


def unavailable(device: str) -> str | None:
    """It needs the package and a GPU."""
    return fla.missing(device)


def unsupported(case: Case, device: str) -> str | None:
    """As the package's interface has it."""
    return fla.unsupported(case)


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The backward computes the mix again."""
    return fla.call(case, checkpoint_level=1)
