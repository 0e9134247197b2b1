"""``torch.compile`` of the definition with every kernel tuned by trial.

Without Inductor's own CUDA graphs: the timer captures every contestant in the same way, and a graph
inside a graph is not possible.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..inputs import Inputs
from ..memory import missing_memory
from ..registry import Case
from .compiling import compile_definition, missing_compiler

ABOUT = "torch.compile of attnres_ext.reference, mode max-autotune-no-cudagraphs, static shapes"


def unavailable(device: str) -> str | None:
    """As in the default mode."""
    return missing_compiler(device)


def unsupported(case: Case, device: str) -> str | None:
    """As in the default mode."""
    return missing_memory(case, device)


def prepare(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Compiles and tunes."""
    return compile_definition(case, mode="max-autotune-no-cudagraphs")
