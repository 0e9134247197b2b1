"""Loads the compiled operators: after importing this module, ``torch.ops.attnres.*`` exists."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["LIBRARY"]

#: The operators' shared library, which knows neither Python nor the version of torch.
LIBRARY = Path(__file__).with_name("_ops.so")


def _load() -> None:
    if not LIBRARY.exists():
        raise ImportError(
            f"attnres_ext: the compiled operators are missing at {LIBRARY}; "
            "build and install the package with `pip install .` (see README.md)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(
            f"attnres_ext: could not load {LIBRARY} into torch {torch.__version__} "
            f"(2.10 or later is needed): {error}"
        ) from error


_load()
