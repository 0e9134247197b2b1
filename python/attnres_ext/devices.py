"""What the traffic plan is told of a device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

__all__ = ["plan_device"]

#: Of a multiprocessor's shared memory, what the driver keeps for itself in each CTA.
RESERVED_SHARED_BYTES = 1024


@cache
def plan_device(device: torch.device) -> dict[str, Any]:
    """The arguments of ``_C.plan`` that say what ``device`` is.

    A device that is neither a CPU nor there, such as ``meta``, is planned for like an H100.
    """
    if device.type == "cpu":
        return {"device": "cpu"}
    if device.type != "cuda" or not torch.cuda.is_available():
        return {"device": "cuda"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": "cuda",
        "capability": 10 * properties.major + properties.minor,
        "shared_bytes": properties.shared_memory_per_multiprocessor - RESERVED_SHARED_BYTES,
    }
