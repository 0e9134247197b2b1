"""The operators' and the module's tests on simulated GPUs, in processes of their own.

A process has one library of operators: in these it is the one with a simulated GPU. To start one
takes longer than most files do, so a process has all files of a subject.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from .build import ROOT, missing

pytestmark = pytest.mark.long
#: Every kernel by every way, and the cache's reads and writes in place.
FEW = ["tests/ops/test_every_kernel.py", "tests/ops/test_block_cache.py"]


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--device", "simulated", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


@pytest.fixture(autouse=True)
def _can_build() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.mark.parametrize("subject", ["ops", "module", "simt"])
def test_everything_on_an_h100(subject: str) -> None:
    run(f"tests/{subject}")


@pytest.mark.parametrize("simulated", ["a100", "small"])
def test_every_kernel_on_another_device(simulated: str) -> None:
    run("--simulate", simulated, *FEW)
