"""Measures again what the documents show and the report draws, one part after the other.

    python tools/measure.py        behind `make results`

Every part keeps what it found in ``benchmarks/results``. A run that was interrupted is gone on with
by the next one, as long as the code is the same: parts that are done are not done again, and the
benchmark goes on within its part.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Which parts of an unfinished run are done.
STATE = ROOT / "build" / "measure.json"
#: Seconds that a program which was interrupted has to show what it has.
_GRACE = 15.0
#: Settings of a shell by which torch would take fewer cores than there are.
_FEWER_CORES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
#: Programs that wait for a core or compute, on average: more is not a quiet machine.
_BUSY = 0.5


@dataclass(frozen=True)
class Part:
    """One thing to do.

    Attributes:
        name: short.
        about: for people.
        minutes: about how long, on two cores.
        command: program and arguments.
    """

    name: str
    about: str
    minutes: int
    command: tuple[str, ...]


_ATTNRES = (sys.executable, "-m", "attnres_ext")
_RESULTS = "benchmarks/results"
PARTS = (
    Part(
        "build",
        "a build from nothing",
        8,
        (sys.executable, "tools/time_build.py", "--out", _RESULTS),
    ),
    Part(
        "bench",
        "every operator and whole models on the CPU",
        25,
        (*_ATTNRES, "bench", "--device", "cpu", "--suite", "all", "--out", _RESULTS, "--resume"),
    ),
    Part(
        "plain",
        "the headline figures in a process that gives freed memory back",
        1,
        (*_ATTNRES, "bench", "--device", "cpu", "--allocator", "system", "--out", _RESULTS,
         "--resume"),
    ),
    Part(
        "training",
        "the demo's training run",
        5,
        (*_ATTNRES, "train", "--preset", "demo", "--residual", "standard,block", "--steps", "160",
         "--out", "runs/demo", "--overwrite"),
    ),
    Part(
        "figures",
        "tables in documents",
        1,
        (sys.executable, "tools/figures.py", "--add-training", "runs/demo"),
    ),
    Part("report", "all of it as one page", 1, (*_ATTNRES, "bench", "report", _RESULTS)),
)  # fmt: skip

Run = Callable[[Sequence[str]], int]


def run(command: Sequence[str]) -> int:
    """Runs a program in the checkout and returns its exit code.

    Raises:
        KeyboardInterrupt: somebody interrupted it; it has had the time to show what it has.
    """
    # All cores, as in the runs before; and what a part starts is found where this Python is.
    environment = {name: value for name, value in os.environ.items() if name not in _FEWER_CORES}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with subprocess.Popen(command, cwd=ROOT, env={**environment, "PATH": path}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.terminate()
            raise


def describe() -> dict[str, Any]:
    """Which code lies here."""
    from attnres_ext.benchmarks import machine

    return machine.code()


def finished(code: dict[str, Any]) -> list[str]:
    """Parts that an interrupted run of the same code has done."""
    try:
        state = json.loads(STATE.read_text())
        return list(state["finished"]) if state["code"] == code else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def main(run: Run = run) -> int:
    """Does every part that is not done.

    Args:
        run: runs a program.

    Returns:
        The exit code: of the part that failed, or 0.
    """
    code = describe()
    done = finished(code)
    waiting = [part for part in PARTS if part.name not in done]
    if done:
        _say(f"going on with an interrupted run; done already: {', '.join(done)}")
    _say(f"{len(waiting)} parts, about {sum(part.minutes for part in waiting)} min on two cores:")
    for part in waiting:
        _say(f"  {part.name}, {part.about}, about {part.minutes} min")
    load = os.getloadavg()[0]
    if load > _BUSY:
        _say(
            f"other programs keep this machine busy (load average {load:.1f}); results will say so"
        )
    if code["modified"]:
        _say("files here differ from the commit; results will say so")
    begin = time.monotonic()
    for number, part in enumerate(waiting, start=1):
        minutes = (time.monotonic() - begin) / 60
        left = sum(other.minutes for other in waiting[number - 1 :])
        time_shown = f"{minutes:.0f} min so far, about {left} left"
        _say(f"part {number} of {len(waiting)}, {part.name}: {time_shown}")
        try:
            failed = run(part.command)
        except KeyboardInterrupt:
            failed = 130
        if failed:
            how = "was interrupted" if failed == 130 else f"failed with {failed}"
            _say(f"{part.name} {how}; the same command goes on from there")
            return failed
        done.append(part.name)
        STATE.parent.mkdir(exist_ok=True)
        STATE.write_text(json.dumps({"code": code, "finished": done}))
    # The next run measures everything again.
    STATE.unlink(missing_ok=True)
    minutes = (time.monotonic() - begin) / 60
    _say(f"all done in {minutes:.0f} min: commit {_RESULTS} and the documents that changed")
    return 0


def _say(line: str) -> None:
    print(f"results: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # Whoever ends a program without a terminal sends this.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
