"""Tests in processes that they may take along.

A kernel that hangs, or an illegal address, ends what its process can do. Such a test is noted, and
a new process goes on with the next one: what is wrong with one kernel leaves the others' outcomes.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_check.process import ROOT, Finished, Setting

#: Exit code of a process whose GPU context is of no use any more.
LOST = 86
#: Of so many failing tests the record has all that they said, and so many characters of it.
_TEXTS, MOST_TEXT = 10, 4000


@dataclass(frozen=True)
class Suite:
    """Which tests, and how.

    Attributes:
        name: of its logs.
        paths: files and folders.
        options: of pytest.
        patience: seconds that a test may take.
        processes: at most.
        under: a program that runs the tests, and its arguments.
        environment: variables.
    """

    name: str
    paths: Sequence[str]
    options: Sequence[str] = ()
    patience: float = 30.0
    processes: int = 1
    under: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)


def run(setting: Setting, suite: Suite, seconds: float) -> tuple[dict[str, Any], list[Finished]]:
    """Runs a suite.

    Returns:
        Its entry in the record, without ``status`` and ``reason`` where every test passed; and how
        the processes ended.
    """
    begin = time.monotonic()
    # A process takes half a gigabyte of the GPU's memory before it has done anything.
    count = max(1, min(suite.processes, (os.cpu_count() or 1) - 1))
    files = [setting.logs / f"{suite.name}-{index}.jsonl" for index in range(count)]
    for file in files:
        file.unlink(missing_ok=True)

    def turns(index: int) -> list[Finished]:
        return _turns(setting, suite, f"{index}/{count}", files[index], begin + seconds)

    with ThreadPoolExecutor(count) as pool:
        ended = [finished for turn in pool.map(turns, range(count)) for finished in turn]
    entry = {"seconds": time.monotonic() - begin, **summary(files)}
    return {**entry, **_verdict(entry, ended, seconds)}, ended


def _turns(
    setting: Setting, suite: Suite, share: str, outcomes: Path, end: float
) -> list[Finished]:
    """One process after another, until all tests of the share have had their turn."""
    command = [
        *suite.under,
        setting.python.path, "-m", "pytest", "-q", "--tb=short", "-p", "tests.outcomes",
        "--outcomes", str(outcomes), "--share", share, "-p", "no:cacheprovider",
        *suite.options,
        *(path for path in suite.paths if (ROOT / path).exists()),
    ]  # fmt: skip
    ended: list[Finished] = []
    while True:
        log = f"{outcomes.stem}-{len(ended)}"
        seconds = max(1.0, end - time.monotonic())
        ended.append(
            setting.start(log, command, seconds, patience=suite.patience, **suite.environment)
        )
        lost = _note_lost(outcomes, ended[-1], suite.patience)
        if ended[-1].timed_out or not (lost or ended[-1].code == LOST):
            return ended


def _note_lost(outcomes: Path, finished: Finished, patience: float) -> bool:
    """Whether the process ended within a test, which is noted as failed."""
    if finished.timed_out:
        return False
    lines = [line for line in read_lines(outcomes) if "test" in line]
    if not lines or lines[-1]["outcome"] != "begun":
        return False
    if finished.stuck:
        reason = f"did not end within {patience:.0f} s"
    elif finished.code < 0:
        reason = f"its process was ended by {signal.Signals(-finished.code).name}"
    else:
        reason = f"its process ended with code {finished.code}"
    text = "\n".join(finished.output.splitlines()[-30:])
    line = {"test": lines[-1]["test"], "outcome": "failed", "seconds": finished.seconds}
    append(outcomes, {**line, "reason": reason, "text": text, "lost": True})
    return True


def _verdict(entry: dict[str, Any], ended: Sequence[Finished], seconds: float) -> dict[str, Any]:
    failed = [test for test, outcome in entry["tests"].items() if outcome == "failed"]
    out_of_time = any(finished.timed_out for finished in ended)
    late = f"stopped after {seconds:.0f} s" if out_of_time else ""
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        reason = f"{failed[0]}{more}"
        return {"status": "failed", "reason": f"{reason}; {late}" if late else reason}
    if out_of_time:
        return {"status": "out of time", "reason": late}
    # 5: no tests, as where another process has run those of this one's share before.
    broken = [finished for finished in ended if finished.code not in (0, 5)]
    if broken or not entry["counts"].get("passed"):
        return {"status": "failed", "reason": (broken or ended)[0].last_line}
    return {"status": "passed", "reason": ""}


# ``tests/outcomes.py`` notes how tests end in a file: a JSON line each time one begins or ends.


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line; a process that was killed may have left a half one."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line, after whatever a process that was killed has left."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def summary(files: Sequence[Path]) -> dict[str, Any]:
    """What several processes wrote.

    Returns:
        ``tests``, the outcome of each test ("unfinished" where it had begun when time was over);
        ``reasons`` of those that did not pass; ``texts``, all that the first failures said;
        ``counts`` of each outcome; ``collected``, how many there were to run.
    """
    tests: dict[str, str] = {}
    reasons: dict[str, str] = {}
    texts: dict[str, str] = {}
    collected = 0
    for line in (line for file in files for line in read_lines(file)):
        collected += line.get("collected", 0)
        if "test" not in line:
            continue
        name = line["test"]
        # A test that fails in its teardown has passed before.
        if tests.get(name) != "failed":
            tests[name] = "unfinished" if line["outcome"] == "begun" else line["outcome"]
        if line.get("reason"):
            reasons[name] = line["reason"]
        if line.get("text") and len(texts) < _TEXTS:
            texts[name] = line["text"]
    return {
        "counts": dict(Counter(tests.values())),
        "collected": collected,
        "reasons": reasons,
        "texts": texts,
        "tests": tests,
    }
