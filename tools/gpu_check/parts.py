"""What is checked: the tests, the benchmarks, three checkers of compute-sanitizer."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu_check.process import ROOT, Finished, Run
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
        self, part: str, arguments: list[str], seconds: float, **environment: str
    ) -> Finished:
        """Runs the Python with the package in reach."""
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


def run_tests(setting: Setting, seconds: float) -> dict[str, Any]:
    """Every test of an operator, of the module and of the CUDA behaviour, on the device."""
    path = setting.logs / "outcomes.jsonl"
    path.unlink(missing_ok=True)
    command = _pytest(setting, path, "tests/cuda", "tests/ops", "tests/module", "tests/compat")
    if setting.python.facts["xdist"]:
        # A process takes half a gigabyte of the GPU's memory before it has done anything.
        workers = max(1, min(6, (os.cpu_count() or 1) - 1))
        command += ["-n", str(workers), "--dist", "worksteal"]
    finished = setting.start("tests", command, seconds)
    entry = {"seconds": finished.seconds, **read_outcomes(path)}
    failed = [test for test, outcome in entry["tests"].items() if outcome == "failed"]
    if finished.timed_out:
        return {**entry, "status": "out of time", "reason": f"stopped after {seconds:.0f} s"}
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        return {**entry, "status": "failed", "reason": f"{failed[0]}{more}"}
    if finished.code != 0 or not entry["counts"].get("passed"):
        return {**entry, "status": "failed", "reason": _last_line(finished)}
    return {**entry, "status": "passed", "reason": ""}


def read_outcomes(path: Path) -> dict[str, Any]:
    """What ``tests/outcomes.py`` wrote.

    Returns:
        ``tests``, the outcome of each test; ``reasons`` of those that did not pass; ``counts`` of
        each outcome.
    """
    tests: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            report = json.loads(line)
        except ValueError:
            continue  # a run that was killed may leave half a line
        name = report["test"]
        # A test that fails in its teardown has passed before.
        if tests.get(name) != "failed":
            tests[name] = report["outcome"]
        if report["reason"]:
            reasons[name] = report["reason"]
    return {"counts": dict(Counter(tests.values())), "reasons": reasons, "tests": tests}


def _pytest(setting: Setting, outcomes: Path, *paths: str) -> list[str]:
    return [
        setting.python.path, "-m", "pytest", "-q", "--tb=short", "-p", "tests.outcomes",
        "--outcomes", str(outcomes), "--device", setting.device, "-p", "no:cacheprovider",
        *(path for path in paths if (ROOT / path).exists()),
    ]  # fmt: skip


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
    path = setting.logs / f"{tool}-outcomes.jsonl"
    path.unlink(missing_ok=True)
    command = [
        program, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "20",
        "--kernel-name", f"kernel_substring={_OURS}",
    ]  # fmt: skip
    if tool == "memcheck":
        # torch asks the driver for much that it can do without.
        command += ["--report-api-errors", "no"]
    command += [*_pytest(setting, path, "tests/cuda", "tests/ops"), "-m", "sanitizer"]
    # Without torch's cache each tensor is an allocation of its own, whose end is known.
    finished = setting.start(tool, command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    found = found_errors(finished.output)
    entry = {"seconds": finished.seconds, "errors": found, **read_outcomes(path)}
    if finished.timed_out:
        return {**entry, "status": "out of time", "reason": f"stopped after {seconds:.0f} s"}
    if found:
        first = next(line for line in finished.output.splitlines() if _REPORT.match(line))
        return {**entry, "status": "failed", "reason": first.lstrip("= ")}
    if found is None or finished.code != 0 or not entry["counts"].get("passed"):
        if "not supported" in finished.output.lower():
            return {**entry, "status": "unavailable", "reason": _last_line(finished)}
        return {**entry, "status": "failed", "reason": _last_line(finished)}
    return {**entry, "status": "passed", "reason": ""}


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
    return _benchmark("bench", setting, seconds, "--suite", suite)


def run_models(setting: Setting, seconds: float) -> dict[str, Any]:
    """A training step, a prefill and decoding steps of one stack; small ones on the CPU."""
    stack = "*/L12-D2304-S6-B1-*" if setting.device == "cuda" else "decode/L8-D256-S4-B1-*"
    return _benchmark("models", setting, seconds, "--suite", "all", "--filter", stack)


def _benchmark(part: str, setting: Setting, seconds: float, *choice: str) -> dict[str, Any]:
    """``attnres bench``, whose file is rewritten after each case."""
    out = setting.logs / part
    shutil.rmtree(out, ignore_errors=True)
    command = [
        setting.python.path, "-m", "attnres_ext", "bench", "--device", setting.device, *choice,
        "--contestants", ",".join(_RIVALS),
        "--seconds", str(max(1, int(0.9 * seconds))), "--out", str(out),
    ]  # fmt: skip
    finished = setting.start(part, command, seconds)
    files = sorted(out.glob("*.jsonl")) if out.is_dir() else []
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    entry: dict[str, Any] = {"seconds": finished.seconds}
    if lines:
        run, *rows = lines
        entry["figures"] = {"run": run, "results": rows}
    wrong = [
        f"{row['contestant']} in {row['case']}: {row['reason']}"
        for row in lines[1:]
        if row["contestant"] == "ours" and row["status"] in ("wrong", "failed")
    ]
    if wrong:
        return {**entry, "status": "failed", "reason": wrong[0]}
    if finished.timed_out:
        return {**entry, "status": "out of time", "reason": f"stopped after {seconds:.0f} s"}
    if finished.code != 0 or not lines:
        return {**entry, "status": "failed", "reason": _last_line(finished)}
    return {**entry, "status": "passed", "reason": ""}


def _last_line(finished: Finished) -> str:
    lines = [line for line in finished.output.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it printed nothing"
    return f"ended with code {finished.code}: {last}"


def _sanitizer(tool: str, about: str, share: float) -> Part:
    return Part(tool, about, share, lambda setting, seconds: sanitize(tool, setting, seconds))


#: In the order in which they run; what one leaves of its time goes to those after it.
PARTS = (
    Part("tests", "the operators' tests", 5.0, run_tests),
    Part("bench", "the operators' benchmark", 4.0, run_operators),
    Part("models", "a training step, a prefill and decoding steps", 2.0, run_models),
    _sanitizer("memcheck", "accesses out of bounds", 2.0),
    _sanitizer("racecheck", "races in shared memory", 2.0),
    _sanitizer("synccheck", "wrong use of barriers", 1.0),
)
