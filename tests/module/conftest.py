"""Models of these tests on a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.module import naive_residual


@pytest.fixture
def on_device(device: str) -> Iterator[None]:
    """``toy`` and ``embed`` make what they make on each device of this machine."""
    before, naive_residual.device = naive_residual.device, device
    yield
    naive_residual.device = before
