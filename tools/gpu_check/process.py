"""Programs under a time limit, their output kept in a log, and what they share."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.gpu_check.python import Python

ROOT = Path(__file__).resolve().parents[2]

#: Seconds that a program has to end after it was asked to, before it is killed.
_GRACE = 5.0


@dataclass(frozen=True)
class Finished:
    """How a program ended.

    Attributes:
        code: exit code; negative for a signal.
        output: standard output and error, in the order in which they were written.
        seconds: how long it ran.
        timed_out: whether it was stopped because its time was over.
        stuck: whether it was stopped because it had printed nothing for too long.
    """

    code: int
    output: str
    seconds: float
    timed_out: bool = False
    stuck: bool = False

    @property
    def last_line(self) -> str:
        """How it ended, and the last that it printed."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it printed nothing"
        return f"ended with code {self.code}: {last}"


#: Seconds that a program has to print anything at all: the first import of torch on a machine that
#: has just been started reads gigabytes.
_STARTING = 90.0
#: Seconds between two looks at what a program has printed.
_LOOK = 0.2

#: ``run(command, seconds, log, environment, patience)``.
Run = Callable[[Sequence[str], float, Path, Mapping[str, str], float], Finished]


def run(
    command: Sequence[str],
    seconds: float,
    log: Path,
    environment: Mapping[str, str],
    patience: float = math.inf,
) -> Finished:
    """Runs a program in the checkout's root.

    Args:
        command: program and arguments.
        seconds: after which it and whatever it started are stopped.
        log: file for its output.
        environment: variables to set in addition to this process's.
        patience: seconds without a byte of output after which it is taken for stuck and stopped,
            once it has printed something.
    """
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            # A group of its own, so that its children can be stopped with it.
            start_new_session=True,
        )
        timed_out = stuck = False
        try:
            timed_out, stuck = _wait(process, start + seconds, log, patience)
        finally:
            if process.poll() is None:
                _stop(process)
    output = log.read_text(errors="replace")
    # One that even SIGKILL has not ended yet waits for the driver.
    code = -signal.SIGKILL if process.returncode is None else process.returncode
    return Finished(code, output, time.monotonic() - start, timed_out, stuck)


def _wait(
    process: subprocess.Popen[bytes], end: float, log: Path, patience: float
) -> tuple[bool, bool]:
    """Waits for the program to end; says whether its time was over, and whether it is stuck."""
    size, changed = 0, time.monotonic()
    while True:
        try:
            process.wait(_LOOK)
            return False, False
        except subprocess.TimeoutExpired:
            pass
        now = time.monotonic()
        if now >= end:
            return True, False
        printed = log.stat().st_size
        if printed != size:
            size, changed = printed, now
        elif now - changed > (patience if size else max(patience, _STARTING)):
            return False, True


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            return


@dataclass(frozen=True)
class Setting:
    """Who checks what, and where its output goes.

    Attributes:
        python: who runs the tests and the benchmark.
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
        variables = {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "120",
            **environment,
        }
        log = self.logs / f"{part}.log"
        return self.run([*arguments], seconds, log, variables, patience)
