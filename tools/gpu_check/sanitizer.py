"""compute-sanitizer's checkers over the tests marked ``sanitizer``."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from tools.gpu_check import testing
from tools.gpu_check.process import Setting

#: Exit code by which compute-sanitizer tells what it found from a program that failed.
_FOUND = 77
#: Where CUDA toolkits usually lie.
_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
#: Kernels of this library, by a part of their names: what torch's own kernels do is not ours.
_OURS = "attnres"
_SUMMARY = re.compile(
    r"^=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", re.MULTILINE
)
_REPORT = re.compile(r"^=+ (?!COMPUTE-SANITIZER)\S")


def find(packages: Path) -> str | None:
    """compute-sanitizer: on the PATH, in a CUDA toolkit, or as PyPI's wheel brings it.

    Args:
        packages: where the Python's packages lie.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *_TOOLKITS]
    places = [Path(home) / folder for home in homes if home
              for folder in ("bin", "compute-sanitizer")]  # fmt: skip
    places = [*os.get_exec_path(), *places, *packages.glob("nvidia/*/bin")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, places)))


def check(tool: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """The entry of a checker ("memcheck", "racecheck", "synccheck") in the record."""
    missing = {"seconds": 0.0, "status": "unavailable"}
    if setting.device != "cuda":
        return {**missing, "reason": "compute-sanitizer checks CUDA kernels alone"}
    program = find(Path(setting.python.facts["packages"]))
    if program is None:
        return {
            **missing,
            "reason": "compute-sanitizer is not on the PATH and not in CUDA_HOME; it comes with "
            "the CUDA toolkit, and as nvidia-cuda-sanitizer-api from PyPI",
        }
    command = [
        program, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "20",
        "--kernel-name", f"kernel_substring={_OURS}",
    ]  # fmt: skip
    if tool == "memcheck":
        # torch asks the driver for much that it can do without.
        command += ["--report-api-errors", "no"]
    suite = testing.Suite(
        tool,
        ["tests/cuda", "tests/ops"],
        ["--device", setting.device, "-m", "sanitizer"],
        patience=60.0,
        under=command,
        # Without torch's cache each tensor is an allocation of its own, whose end is known.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    entry, ended = testing.run(setting, suite, seconds)
    output = "\n".join(finished.output for finished in ended)
    found = found_errors(output)
    entry["errors"] = found
    if found:
        first = next(line for line in output.splitlines() if _REPORT.match(line))
        return {**entry, "status": "failed", "reason": first.lstrip("= ")}
    if found is None and "not supported" in output.lower():
        return {**entry, "status": "unavailable", "reason": ended[-1].last_line}
    if found is None and entry["status"] == "passed":
        return {**entry, "status": "failed", "reason": ended[-1].last_line}
    return entry


def found_errors(output: str) -> int | None:
    """Errors or hazards that compute-sanitizer counted; None where it did not get that far."""
    counts = [int(a or b) for a, b in _SUMMARY.findall(output)]
    return sum(counts) if counts else None
