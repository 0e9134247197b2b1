"""The standard residual's site as one kernel: the strictest yardstick of overhead there is.

This library's own, which a model with ``mode="standard"`` runs: depth attention over a single
source, which is no attention, so that the sum and its norm are left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnres_ext import ops, reference

from .. import traffic
from ..inputs import EPS, Inputs
from ..registry import Case
from . import ours, standard

ABOUT = "yardstick: x + f(x) and RMSNorm in one kernel, this library's (no depth attention)"

unavailable = ours.unavailable
unsupported = standard.unsupported


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Block summation and norm without blocks."""
    zeros: dict[torch.device, Tensor] = {}

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        query = zeros.get(inputs.query.device)
        if query is None:
            query = zeros[inputs.query.device] = torch.zeros_like(inputs.query, requires_grad=False)
        return _site(ops, inputs, query)

    return call


def definition(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The same in plain PyTorch."""
    return _site(reference, inputs, torch.zeros_like(inputs.query, requires_grad=False))


def _site(functions: Any, inputs: Inputs, query: Tensor) -> tuple[Tensor, ...]:
    return functions.accumulate_depth_attention(
        inputs.partial, inputs.delta, [], query, out_weight=inputs.out_weight, eps=EPS
    )


def bytes_moved(case: Case) -> int:
    """See :func:`attnres_ext.benchmarks.traffic.standard_bytes_moved`."""
    return traffic.standard_bytes_moved(case)
