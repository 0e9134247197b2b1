"""``torch.compile`` of the definition: what a user gets without any of our code."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..inputs import Inputs
from ..memory import missing_memory
from ..registry import Case
from .compiling import compile_definition, missing_compiler

ABOUT = "torch.compile of attnres_ext.reference, default mode, static shapes"


def unavailable(device: str) -> str | None:
    """Inductor's CPU backend calls a C++ compiler, its CUDA backend Triton."""
    return missing_compiler(device)


def unsupported(case: Case, device: str) -> str | None:
    """Its intermediates are fewer than eager's, but a first call may still run out of memory."""
    return missing_memory(case, device)


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Compiles in the default mode."""
    return compile_definition(case)
