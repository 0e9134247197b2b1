"""``torch.compile`` of the definition: what a user gets without any of our code."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from attnres_ext import reference
from attnres_ext.benchmarks.inputs import Inputs, arguments, as_tuple
from attnres_ext.benchmarks.memory import missing_memory
from attnres_ext.benchmarks.registry import Case

ABOUT = "torch.compile of attnres_ext.reference, default mode, static shapes"


def unavailable() -> str | None:
    """Inductor's CPU backend calls a C++ compiler."""
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler and none is on the path"
    return None


def unsupported(case: Case) -> str | None:
    """Its intermediates are fewer than eager's, but a first call may still run out of memory."""
    return missing_memory(case)


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Compiles for this case alone: earlier cases must not turn its shapes into dynamic ones."""
    torch._dynamo.reset()
    function = torch.compile(getattr(reference, case.operator), dynamic=False, fullgraph=True)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        args, keywords = arguments(case, inputs)
        return as_tuple(function(*args, **keywords))

    return call
