"""The compiled operators of this package."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attnres_ext import ops, reference

from ..inputs import Inputs, arguments, as_tuple
from ..registry import Case

ABOUT = "attnres_ext, compiled"


def unavailable(device: str) -> str | None:
    """Without ``_ops.so`` there is nothing to time."""
    if ops.depth_attention is reference.depth_attention:
        return "the compiled operators are not built"
    return None


def unsupported(case: Case, device: str) -> str | None:
    """Every case of the registry is ours."""
    return None


class _Existing:
    """Hands a block's `.grad` to the kernel, as a gradient buffer that others have written to."""

    def __init__(self, source: Tensor):
        self._source = source

    def slot(self, like: Tensor, stream: object = None) -> tuple[Tensor, bool]:
        """The tensor to write into, and that it must be added to."""
        return self._source.grad, True


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The public function; where gradients accumulate, the kernel adds to them itself."""
    function = getattr(ops, case.operator)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        args, keywords = arguments(case, inputs)
        if case.gradients == "accumulate" and inputs.sources:
            buffers = [_Existing(source) for source in inputs.sources]
            return as_tuple(function(*args, **keywords, buffers=buffers))
        return as_tuple(function(*args, **keywords))

    return call
