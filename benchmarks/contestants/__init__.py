"""Who runs against whom: one small file each, found here by name.

A contestant is a module with

``ABOUT``
    one line for people;
``unavailable() -> str | None``
    why it cannot run in this process, or None;
``unsupported(case) -> str | None``
    why it does not do this case, or None;
``prepare(case) -> Callable[[Inputs], tuple[Tensor, ...]]``
    the forward call; compilation and other one-off work belongs here or in the first call.

and, only where it does something else than the case's operator on purpose (a yardstick),

``definition(case, inputs)``
    what its results must be, in plain PyTorch, for the correctness gate;
``bytes_moved(case) -> int``
    what it must move.

It must never be timed before :mod:`attnres_ext.benchmarks.gate` has let it pass.
"""

from __future__ import annotations

import importlib
from types import ModuleType

#: In the order of the table.
NAMES = ("ours", "eager", "compile", "standard")

_MODULES = {"ours": "ours", "eager": "eager", "compile": "compiled", "standard": "standard"}


class UnknownContestantError(ValueError):
    """There is no contestant of that name."""


def get(name: str) -> ModuleType:
    """The contestant ``name``.

    Raises:
        UnknownContestantError: no such contestant.
    """
    if name not in _MODULES:
        raise UnknownContestantError(f"contestant '{name}' is not one of {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{_MODULES[name]}")
