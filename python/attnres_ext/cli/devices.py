"""Devices as users name them."""

from __future__ import annotations

import torch

from attnres_ext.training.errors import UserError


def check_device(device: str) -> None:
    """Refuses a device that is unknown or not there.

    Raises:
        UserError: Nothing can be allocated on ``device``.
    """
    try:
        torch.empty(0, device=device)
    # torch raises whatever the backend at hand raises.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used: {reason}") from error
