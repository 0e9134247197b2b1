"""The runners that the tests of kernel bodies take."""

from __future__ import annotations

import pytest

from .build import FLAVOURS, Runner, runner_or_skip


@pytest.fixture(scope="session", params=FLAVOURS)
def runner(request: pytest.FixtureRequest) -> Runner:
    """Every way to run a kernel."""
    return runner_or_skip(request.param)
