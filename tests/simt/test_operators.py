"""The operators' and the module's tests on simulated GPUs, each in a process of its own.

A process has one library of operators: in these it is the one with a simulated GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .build import ROOT, missing

SUBJECTS = ("ops", "module", "simt")
FILES = [
    str(path.relative_to(ROOT))
    for subject in SUBJECTS
    for path in sorted((ROOT / "tests" / subject).glob("test_*.py"))
    if path != Path(__file__)
]
#: Every kernel by every way, and the cache's reads and writes in place.
FEW = ["tests/ops/test_every_kernel.py", "tests/ops/test_block_cache.py"]
#: pytest found no test that is about a device.
NOTHING = 5


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--device", "simulated", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, NOTHING), done.stdout[-8000:] + done.stderr[-4000:]


@pytest.fixture(autouse=True)
def _can_build() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.mark.parametrize("path", FILES)
def test_everything_on_an_h100(path: str) -> None:
    run(path)


@pytest.mark.parametrize("simulated", ["a100", "small"])
def test_every_kernel_on_another_device(simulated: str) -> None:
    run("--simulate", simulated, *FEW)
