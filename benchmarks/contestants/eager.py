"""The definition in plain PyTorch, as a reader of the paper would write it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attnres_ext import reference

from ..inputs import Inputs, arguments, as_tuple
from ..memory import missing_memory
from ..registry import Case

ABOUT = "attnres_ext.reference, eager PyTorch"


def unavailable(device: str) -> str | None:
    """PyTorch is always there."""
    return None


def unsupported(case: Case, device: str) -> str | None:
    """Stacked float32 copies of all sources, and products as large, must fit into memory."""
    return missing_memory(case, device)


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The function of :mod:`attnres_ext.reference`."""
    function = getattr(reference, case.operator)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        args, keywords = arguments(case, inputs)
        return as_tuple(function(*args, **keywords))

    return call
