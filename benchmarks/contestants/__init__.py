"""Who runs against whom: one small file each, found here by name.

A contestant is a module with

``ABOUT``
    one line for people;
``unavailable(device) -> str | None``
    why it cannot run in this process on "cpu" or "cuda", or None;
``unsupported(case, device) -> str | None``
    why it does not do this case there, or None;
``prepare(case) -> Callable[[Inputs], tuple[Tensor, ...]]``
    the forward call; compilation and other one-off work belongs here or in the first call.

``WEIGHT_DTYPE``
    only where its interface takes weights in another dtype than float32;

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
_MODULES = {
    "ours": "ours",
    "eager": "eager",
    "compile": "compiled_default",
    "compile-max": "compiled_autotuned",
    "fla": "fla_recompute",
    "fla-keep": "fla_keep",
    "fla-gluon": "fla_gluon",
    "liger": "liger",
    "flash-attn-res": "flash_attn_res",
    "fast-attnres": "fast_attnres",
    "standard": "standard",
    "standard-fused": "standard_fused",
}
NAMES = tuple(_MODULES)
#: Tuning every kernel by trial takes longer than all else together: only when asked for.
USUAL = tuple(name for name in NAMES if name != "compile-max")


class UnknownContestantError(ValueError):
    """There is no contestant of that name."""


def check(name: str) -> None:
    """Refuses a name that no contestant has.

    Raises:
        UnknownContestantError: no such contestant.
    """
    if name not in _MODULES:
        raise UnknownContestantError(f"contestant '{name}' is not one of {', '.join(NAMES)}")


def get(name: str) -> ModuleType:
    """The contestant ``name``.

    Raises:
        UnknownContestantError: no such contestant.
    """
    check(name)
    return importlib.import_module(f"{__name__}.{_MODULES[name]}")
