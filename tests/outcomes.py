"""A pytest plugin that notes how each test ends: ``-p tests.outcomes --outcomes FILE``.

One JSON line a test, so that a run which is stopped or crashes keeps what it has.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="write every test's outcome")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    # With xdist, reports of all workers arrive in the process that started them.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(path))


class _Writer:
    def __init__(self, path: Path):
        self._path = path
        path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Setup and teardown count where they are what went wrong, or why nothing was run.
        if report.when != "call" and report.passed:
            return
        outcome = "failed" if report.failed else report.outcome
        reason = ""
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).splitlines()[0]
        line = {"test": report.nodeid, "outcome": outcome, "seconds": report.duration}
        with self._path.open("a") as file:
            file.write(json.dumps({**line, "reason": reason}) + "\n")
