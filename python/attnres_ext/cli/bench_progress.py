"""Where a benchmark is and how long it may still take: a bar on a terminal, or lines in a log."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

if TYPE_CHECKING:
    from attnres_ext.benchmarks.session import Session


class Display:
    """Progress of a run on stderr: tables go to stdout, where they may be piped.

    Args:
        session: the run; what it has already counts as done.
        steps: whether a log is told each step of a case.
    """

    def __init__(self, session: Session, steps: bool = False):
        console = Console(stderr=True)
        self._session = session
        self._total = len(session.expected)
        self._progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            # Drawn when something changes: a thread of its own would run while others are timed.
            auto_refresh=False,
        )
        done = len(session.finished)
        self._task = self._progress.add_task("", total=self._total, completed=done, left="")
        self._lines = not console.is_terminal
        self._steps = steps

    def __enter__(self) -> Display:
        self._progress.start()
        left = self._total - len(self._session.finished)
        self._log(f"{left} case{'' if left == 1 else 's'}, {self._left()}")
        self._update("")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        """Shows that a case begins."""
        if self._steps:
            self._log(f"case {name}")

    def step(self, case: str, what: str) -> None:
        """Shows what is going on in a case."""
        self._update(f"{case}: {what}")
        if self._steps:
            self._log(f"  {what}")

    def done(self, case: str, seconds: float) -> None:
        """Shows that a case is over."""
        done = len(self._session.finished)
        self._progress.update(self._task, completed=done, refresh=True)
        self._log(f"{done}/{self._total}  {case}: {seconds:.0f} s; {self._left()}")

    def _update(self, description: str) -> None:
        self._progress.update(self._task, description=description, left=self._left(), refresh=True)

    def _log(self, line: str) -> None:
        if self._lines:
            print(line, file=sys.stderr, flush=True)

    def _left(self) -> str:
        seconds = self._session.seconds_left
        if seconds < 90:
            return f"about {seconds:.0f} s left"
        return f"about {seconds / 60:.0f} min left"
