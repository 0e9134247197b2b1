"""What is checked: the tests, the benchmarks, three checkers of compute-sanitizer."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu_check import benching, testing
from tools.gpu_check.process import Finished, Run
from tools.gpu_check.python import Python

#: Exit code by which compute-sanitizer tells what it found from a program that failed.
_FOUND = 77
#: Where CUDA toolkits usually lie.
_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
#: Compiling the definition anew for each case would take all the time there is.
_RIVALS = (
    "ours", "standard", "standard-fused", "eager", "fla", "fla-keep", "fla-gluon", "liger",
    "flash-attn-res", "fast-attnres",
)  # fmt: skip
#: Every kernel once, on few tokens.
_KERNELS = "tests/ops/test_every_kernel.py"
_PROCESSES = 6
#: A decoding step, its reads alone, and a training step of 8192 tokens: what the goals are set for.
STACKS = "[drt]*/L12-D2304-S6-B1-T[18]*"
#: Kernels of this library, by a part of their names: what torch's own kernels do is not ours.
_OURS = "attnres"


@dataclass(frozen=True)
class Setting:
    """What all parts share.

    Attributes:
        python: who runs them.
        device: "cuda", or "cpu" for a rehearsal.
        package: folder with the package, for PYTHONPATH.
        logs: folder for outputs.
        run: starts programs.
    """

    python: Python
    device: str
    package: Path
    logs: Path
    run: Run

    def start(
        self,
        part: str,
        arguments: list[str],
        seconds: float,
        patience: float = math.inf,
        **environment: str,
    ) -> Finished:
        """Runs a program with the package in reach; ``patience`` as for :func:`process.run`."""
        # The package first, then wherever the user has put what the Python lacks.
        path = [str(self.package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return self.run(
            [*arguments],
            seconds,
            self.logs / f"{part}.log",
            {
                "PYTHONPATH": os.pathsep.join(path),
                "PYTHONUNBUFFERED": "1",
                "COLUMNS": "120",
                **environment,
            },
            patience,
        )


@dataclass(frozen=True)
class Part:
    """One thing to do.

    Attributes:
        name: as ``--parts`` takes it.
        about: for people.
        share: its share of the time, against the others' shares.
        check: ``check(setting, seconds)`` returns its entry in the record: ``status`` ("passed",
            "failed", "out of time" or "unavailable"), ``reason``, ``seconds`` and what it found.
    """

    name: str
    about: str
    share: float
    check: Callable[[Setting, float], dict[str, Any]]


def run_kernels(setting: Setting, seconds: float) -> dict[str, Any]:
    """Every kernel by every way in which it is launched: what is wrong with one of them shows here,
    whatever becomes of the others."""
    options = ["--device", setting.device]
    suite = testing.Suite("kernels", [_KERNELS], options, patience=20.0, processes=_PROCESSES)
    return testing.run(setting, suite, seconds)[0]


def run_tests(setting: Setting, seconds: float) -> dict[str, Any]:
    """Every other test of an operator, of the module and of the CUDA behaviour, on the device."""
    folders = ["tests/cuda", "tests/ops", "tests/module", "tests/compat"]
    options = ["--device", setting.device, "--ignore", _KERNELS]
    suite = testing.Suite("tests", folders, options, processes=_PROCESSES)
    return testing.run(setting, suite, seconds)[0]


def find_sanitizer(packages: Path) -> str | None:
    """compute-sanitizer: on the PATH, in a CUDA toolkit, or as PyPI's wheel brings it.

    Args:
        packages: where the Python's packages lie.
    """
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    homes += _TOOLKITS
    places = os.get_exec_path()
    places += [str(Path(home) / folder) for home in homes if home
               for folder in ("bin", "compute-sanitizer")]  # fmt: skip
    places += map(str, packages.glob("nvidia/*/bin"))
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def sanitize(tool: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """A checker of compute-sanitizer over the tests marked ``sanitizer``."""
    missing = {"seconds": 0.0, "status": "unavailable"}
    if setting.device != "cuda":
        return {**missing, "reason": "compute-sanitizer checks CUDA kernels alone"}
    program = find_sanitizer(Path(setting.python.facts["packages"]))
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


_SUMMARY = re.compile(
    r"^=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", re.MULTILINE
)
_REPORT = re.compile(r"^=+ (?!COMPUTE-SANITIZER)\S")


def found_errors(output: str) -> int | None:
    """Errors or hazards that compute-sanitizer counted; None where it did not get that far."""
    counts = [int(a or b) for a, b in _SUMMARY.findall(output)]
    return sum(counts) if counts else None


def run_operators(setting: Setting, seconds: float) -> dict[str, Any]:
    """The operators' benchmark."""
    suite = "ops" if setting.device == "cuda" else "quick"
    # Other people's kernels are compiled, and tuned by trial, within a step.
    return _benchmark("bench", setting, seconds, 60.0, "--suite", suite)


def run_models(setting: Setting, seconds: float) -> dict[str, Any]:
    """A decoding step, its reads alone and a training step of one stack; small ones on the CPU."""
    stack = STACKS if setting.device == "cuda" else "[dr]*/L8-D256-S4-B1-*"
    return _benchmark("models", setting, seconds, 120.0, "--suite", "all", "--filter", stack)


def _benchmark(
    part: str, setting: Setting, seconds: float, patience: float, *choice: str
) -> dict[str, Any]:
    rivals = ",".join(_RIVALS)
    return benching.run(setting, part, seconds, patience, *choice, "--contestants", rivals)


def _sanitizer(tool: str, about: str, share: float) -> Part:
    return Part(tool, about, share, lambda setting, seconds: sanitize(tool, setting, seconds))


#: In the order in which they run; what one leaves of its time goes to those after it.
PARTS = (
    Part("kernels", "each kernel, each way in which it is launched", 3.0, run_kernels),
    Part("tests", "the operators' tests", 5.0, run_tests),
    Part("bench", "the operators' benchmark", 4.0, run_operators),
    Part("models", "a decoding step, its reads, a training step", 4.0, run_models),
    _sanitizer("memcheck", "accesses out of bounds", 2.0),
    _sanitizer("racecheck", "races in shared memory", 2.0),
    _sanitizer("synccheck", "wrong use of barriers", 1.0),
)
