"""Every set of CPU kernels that this machine can run gives right results, not only the widest."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnres_ext as ax

SETS = ("baseline", "avx2", "avx512") if platform.machine() == "x86_64" else ("baseline", "armv86")
HERE = Path(__file__).parent


def run(arguments: list[str], instruction_set: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, since a process chooses its kernels once."""
    environment = {**os.environ, "ATTNRES_CPU": instruction_set, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", SETS)
def test_operators_match_their_definitions(name: str) -> None:
    widest = torch.ops.attnres.cpu_instruction_set()
    if SETS.index(name) >= SETS.index(widest):
        pytest.skip(f"tested by the other tests: they run on {widest}")
    files = [
        HERE / f"test_{stem}.py"
        for stem in (
            "depth_attention",
            "accumulate_depth_attention",
            "inter_block_attention",
            "merge_partial",
            "large_results",
        )
    ]
    chosen = (
        "test_matches_definition or test_as_torch_rounds or test_every_half_survives"
        " or test_many_long_rows or test_large_results_equal_small_ones"
    )
    pytest_arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen, str(HERE / __file__)]
    done = run(["-m", "pytest", *map(str, files), *pytest_arguments], name)
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_half_survives() -> None:
    """The only source is returned as it is, numbers below the normal ones too; -0 becomes 0."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()].reshape(-1, 64)
    out = ax.depth_attention([halves], torch.zeros(64))
    assert torch.equal(out, halves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_torch_rounds(dtype: torch.dtype) -> None:
    """Sums are rounded to the partial's dtype: ties, and numbers below the normal ones, too."""
    delta = torch.randn(256, 64) * 2.0 ** torch.randint(-26, 15, (256, 1))
    delta[0] = (torch.arange(64) * 2 + 1) * 2.0**-25  # ties of float16 below its normal numbers
    delta[1] = 1 + (torch.arange(64) * 2 + 1) * 2.0**-11  # ties above
    delta[2, :3] = torch.tensor([torch.inf, -torch.inf, 1e30])
    partial = torch.zeros(256, 64, dtype=dtype)
    _, total = ax.accumulate_depth_attention(partial, delta, [], torch.zeros(64))
    assert torch.equal(total, delta.to(dtype))


def test_an_unknown_set_is_refused() -> None:
    code = "import attnres_ext, torch; print(torch.ops.attnres.cpu_instruction_set())"
    done = run(["-c", code], "mmx")
    assert done.returncode != 0
    assert "ATTNRES_CPU is 'mmx', expected" in done.stderr
    assert "baseline" in done.stderr
