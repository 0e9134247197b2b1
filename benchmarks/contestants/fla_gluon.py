"""flash-linear-attention's Gluon backend, which its users switch on by an environment variable."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

from ..inputs import Inputs
from ..registry import Case
from . import fla

ABOUT = "fla.ops.attnres.fused_attnres, Gluon backend (FLA_ATTNRES_GLUON=1), checkpoint_level 1"


def unavailable(device: str) -> str | None:
    """It needs the package, a GPU and a Triton with Gluon; without it Triton would run instead."""
    reason = fla.missing(device)
    if reason is not None:
        return reason
    backends = importlib.import_module("fla.ops.attnres.backends")
    if not hasattr(backends, "AttnResGluonBackend"):
        return "this Triton has no Gluon that flash-linear-attention could use"
    return None


def unsupported(case: Case, device: str) -> str | None:
    """As the package's interface has it, and rows that its copies can move."""
    if case.hidden * 2 < 128:
        return "its Gluon backend leaves rows below 128 bytes to Triton"
    return fla.unsupported(case)


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The Gluon kernels."""
    return fla.call(case, gluon=True)
