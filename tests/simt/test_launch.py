"""How kernels are launched, on a simulated device: runtime/test_launch.cpp says what."""

from __future__ import annotations

import subprocess

import pytest

from .build import build_launch_test, missing


def test_launches() -> None:
    if reason := missing():
        pytest.skip(reason)
    done = subprocess.run([build_launch_test()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
