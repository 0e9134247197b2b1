"""What the contestants from flash-linear-attention share: ``fused_attnres`` on a list."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from attnres_ext import reference

from ..inputs import EPS, Inputs
from ..registry import Case
from . import packages

#: Read by the package whenever it chooses a backend.
_SWITCH = "FLA_ATTNRES_GLUON"


def missing(device: str) -> str | None:
    """Why the package cannot run, or None."""
    return packages.missing("flash-linear-attention", "fla.ops.attnres", device)


def unsupported(case: Case) -> str | None:
    """One query over a list of sources; block summation is a plain addition before it."""
    if case.operator not in ("depth_attention", "accumulate_depth_attention"):
        return "fused_attnres has one query and no merge"
    return None


def call(
    case: Case, checkpoint_level: int = 1, gluon: bool = False
) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The forward call.

    Args:
        case: the case.
        checkpoint_level: 0 keeps the mix for the backward, 1 computes it again.
        gluon: whether its Gluon backend is to run; its Triton kernels otherwise.
    """
    from fla.ops.attnres import fused_attnres

    def mix(inputs: Inputs, sources: list[Tensor]) -> Tensor:
        with _backend(gluon):
            return fused_attnres(
                inputs.query,
                sources,
                inputs.key_weight,
                output_rms_weight=inputs.out_weight,
                rms_eps=EPS,
                checkpoint_level=checkpoint_level,
            )

    def depth_attention(inputs: Inputs) -> tuple[Tensor, ...]:
        return (mix(inputs, inputs.sources),)

    def accumulate(inputs: Inputs) -> tuple[Tensor, ...]:
        partial = reference.add_to_partial(inputs.partial, inputs.delta)
        return mix(inputs, [*inputs.sources, partial]), partial

    return depth_attention if case.operator == "depth_attention" else accumulate


@contextmanager
def _backend(gluon: bool) -> Iterator[None]:
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = str(int(gluon))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
