"""A pytest plugin that notes how each test ends: ``-p tests.outcomes --outcomes FILE``.

A JSON line when a test begins and one when it ends: whoever reads the file of a run that was
stopped, or crashed, or hangs, knows what it had and in which test it was. Started again with the
same file, pytest goes on with the tests that have not begun; those of functions that took their
process along come last.

A CUDA error that no call recovers from (an illegal address, say) would fail every test after it.
The process ends instead, with the code LOST.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tools.gpu_check.testing import LOST, MOST_TEXT, append, read_lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write every test's outcome")
    parser.addoption(
        "--share", default="0/1", metavar="I/K", help="of K processes, numbered from 0, this is I"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None:
        index, count = map(int, config.getoption("--share").split("/"))
        config.pluginmanager.register(_Writer(path, index, count))


class _Writer:
    def __init__(self, path: Path, index: int, count: int):
        self._path, self._index, self._count = path, index, count

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        mine = items[self._index :: self._count]
        lines = read_lines(self._path)
        begun = {line["test"] for line in lines if "test" in line}
        lost = Counter(_function(line["test"]) for line in lines if line.get("lost"))
        left = [item for item in mine if item.nodeid not in begun]
        left.sort(key=lambda item: lost[_function(item.nodeid)])
        others = set(items) - set(left)
        if others:
            config.hook.pytest_deselected(items=[item for item in items if item in others])
        items[:] = left
        if not lines:
            append(self._path, {"collected": len(mine)})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items and session.config.getoption("--device", None) == "cuda":
            # Takes seconds, on a machine that has just been started many: not the first test's.
            import torch

            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
        # Whoever watches the output sees that from now on each test says something.
        print(f"{len(session.items)} tests", flush=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        append(self._path, {"test": nodeid, "outcome": "begun"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Setup and teardown count where they are what went wrong, or why nothing was run.
        if report.when != "call" and report.passed:
            return
        outcome = "failed" if report.failed else report.outcome
        line: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": outcome,
            "seconds": report.duration,
            "reason": "",
        }
        if report.skipped:
            line["reason"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            line["reason"] = (crash.message if crash else str(report.longrepr)).splitlines()[0]
            line["text"] = report.longreprtext[-MOST_TEXT:]
            error = _cuda_error()
            if error is not None:
                line |= {"lost": True, "reason": f"{line['reason']} (no call after it: {error})"}
        append(self._path, line)
        if line.get("lost"):
            os._exit(LOST)


def _function(nodeid: str) -> str:
    return nodeid.split("[")[0]


def _cuda_error() -> str | None:
    """What the GPU's context has come to, if it is of no use any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
