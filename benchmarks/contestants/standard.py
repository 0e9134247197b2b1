"""The standard residual's site, add and RMSNorm: not a rival but the yardstick of overhead.

What a model without Attention Residuals pays in the same place. It moves 4X where a site of ours
moves (N + 4)X or 5X; the difference is the price of attending over depth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from attnres_ext import reference

from .. import traffic
from ..inputs import EPS, Inputs
from ..registry import Case

ABOUT = "yardstick: x + f(x), then RMSNorm, in eager PyTorch (no depth attention)"


def unavailable(device: str) -> str | None:
    """PyTorch is always there."""
    return None


def unsupported(case: Case, device: str) -> str | None:
    """Only sites that add a delta and normalise have a counterpart in a standard model."""
    if case.operator not in ("accumulate_depth_attention", "merge_partial") or not case.norm:
        return "a standard model has no such operation"
    if case.gradients == "accumulate":
        return "a standard model has no blocks to accumulate gradients into"
    return None


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Two PyTorch operators."""

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        stream = inputs.partial + inputs.delta
        weight = inputs.out_weight.to(stream.dtype)
        return F.rms_norm(stream, weight.shape, weight, EPS), stream

    return call


def definition(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The sum, rounded to the stream's dtype, and its norm; the gain has the stream's dtype too."""
    stream = reference.add_to_partial(inputs.partial, inputs.delta)
    wide = stream.to(reference.compute_dtype([stream]))
    weight = inputs.out_weight.to(stream.dtype)
    return reference.rms_norm(wide, weight, EPS).to(stream.dtype), stream


def bytes_moved(case: Case) -> int:
    """See :func:`attnres_ext.benchmarks.traffic.standard_bytes_moved`."""
    return traffic.standard_bytes_moved(case)
