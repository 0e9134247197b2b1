"""Programs under a time limit, their output kept in a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """

    code: int
    output: str
    seconds: float
    timed_out: bool = False


#: ``run(command, seconds, log, environment)``.
Run = Callable[[Sequence[str], float, Path, Mapping[str, str]], Finished]


def run(
    command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str]
) -> Finished:
    """Runs a program in the checkout's root.

    Args:
        command: program and arguments.
        seconds: after which it and whatever it started are stopped.
        log: file for its output.
        environment: variables to set in addition to this process's.
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
        timed_out = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                _stop(process)
    output = log.read_text(errors="replace")
    return Finished(process.returncode, output, time.monotonic() - start, timed_out)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            return
