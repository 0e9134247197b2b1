"""Other people's packages: whether they are here."""

from __future__ import annotations

import importlib


def missing(name: str, module: str, device: str) -> str | None:
    """Why a package of CUDA kernels cannot run, or None.

    Args:
        name: of the package on PyPI.
        module: what to import from it.
        device: "cpu" or "cuda".
    """
    if not device.startswith("cuda"):
        return f"{name} has CUDA kernels alone"
    try:
        importlib.import_module(module)
    # Packages that were made for another Triton or torch raise anything.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{name} cannot be imported ({first}); `pip install attnres-ext[rivals]` gets it"
    return None
