"""``torch.compile`` of the definition, in any mode: what the contestants of that kind share."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from attnres_ext import reference

from ..inputs import Inputs, arguments, as_tuple
from ..registry import Case


def missing_compiler(device: str) -> str | None:
    """Why Inductor cannot generate code for the device, or None."""
    if device.startswith("cuda"):
        return None if torch.utils._triton.has_triton() else "torch.compile needs Triton on CUDA"
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler and none is on the path"
    return None


def compile_definition(
    case: Case, mode: str | None = None
) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Compiles for this case alone: earlier cases must not turn its shapes into dynamic ones.

    Args:
        case: the case.
        mode: of ``torch.compile``.
    """
    torch._dynamo.reset()
    function = torch.compile(
        getattr(reference, case.operator), dynamic=False, fullgraph=True, mode=mode
    )

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        args, keywords = arguments(case, inputs)
        return as_tuple(function(*args, **keywords))

    return call
