"""Names of what is done for a site, for profilers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

from attnres_ext.torch_internals import is_profiling

__all__ = ["naming"]

_nothing = nullcontext()


def naming(site: int, what: str = "read") -> AbstractContextManager:
    """Inside, a profiler shows what is done for ``site`` under its number."""
    if torch.compiler.is_compiling() or not is_profiling():
        return _nothing
    return record_function(f"AttentionResiduals: {what} site {site}")
