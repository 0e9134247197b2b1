"""A run on its way: what it has, what is left of it, and how long that may take.

After every case the file is written anew, so whatever ends a run leaves what it has, and another
one can go on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import results
from .results import ModelResult, Result

#: What two runs must have in common to be one.
_SAME = (
    "command", "device", "threads", "cache", "pages_kept", "commit", "modified", "csrc_sha256",
    "versions",
)  # fmt: skip
#: Cases after which their own pace says more than what was expected.
_ENOUGH = 3


@dataclass
class Session:
    """A run on its way.

    Attributes:
        facts: the first line of its file.
        expected: for every case that it is to measure, how many seconds that may take.
        path: its file; None where nothing is kept.
        rows: what it has.
    """

    facts: dict[str, Any]
    expected: Mapping[str, float]
    path: Path | None = None
    rows: list[Result | ModelResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Says in the file what belongs into it."""
        self.facts["cases"] = len(self.expected)
        self.facts.setdefault("case_seconds", {})

    @property
    def begun(self) -> set[str]:
        """Cases that it has, if only us and the yardstick in them."""
        return {row.case for row in self.rows}

    @property
    def finished(self) -> set[str]:
        """Cases that it has with everybody in them."""
        return self.begun - set(self.facts.get("ours_alone", ()))

    @property
    def seconds_left(self) -> float:
        """How long the others may take, at the pace of those that it has."""
        took = self.facts["case_seconds"]
        known = [name for name in took if name in self.expected]
        hoped = sum(self.expected[name] for name in known)
        enough = len(known) >= _ENOUGH and hoped > 0
        pace = sum(took[name] for name in known) / hoped if enough else 1.0
        finished = self.finished
        return pace * sum(s for name, s in self.expected.items() if name not in finished)

    def add(
        self, case: str, rows: Sequence[Result | ModelResult], seconds: float, whole: bool = True
    ) -> None:
        """Keeps what came of a case, in the place of what it had of it.

        Args:
            case: its name.
            rows: its results.
            seconds: how long it took.
            whole: whether everybody is in it; else the others are still to come.

        Raises:
            OSError: the file cannot be written; it holds what it held before.
        """
        self.rows = [row for row in self.rows if row.case != case] + [*rows]
        alone = {*self.facts.get("ours_alone", ())} - {case}
        self.facts["ours_alone"] = sorted(alone if whole else alone | {case})
        if whole:
            self.facts["case_seconds"][case] = round(seconds, 2)
        if self.path is not None:
            results.write(self.path, self.facts, self.rows)

    def resume(self, folder: Path) -> bool:
        """Goes on with the newest run in ``folder`` that was begun in the same way, if it lacks
        anything.

        Returns:
            Whether there is one.
        """
        for path, facts, rows in _kept(folder):
            if any(facts.get(name) != self.facts.get(name) for name in _SAME) or any(
                facts["machine"].get(name) != self.facts["machine"].get(name)
                for name in ("processor", "gpu")
            ):
                continue
            has = {row.case for row in rows} - set(facts.get("ours_alone", ()))
            if set(self.expected) <= has:
                return False
            resumed = [*facts.get("resumed", ()), self.facts["date"]]
            self.path, self.rows = path, rows
            self.facts = {"case_seconds": {}, **facts, "resumed": resumed}
            return True
        return False


def expected_seconds(
    folder: Path | None, device: str, guesses: Mapping[str, float]
) -> dict[str, float]:
    """How long each case may take: as long as last time, or a guess.

    Args:
        folder: with earlier runs; None where there is none.
        device: of the run.
        guesses: for every case.
    """
    found = dict(guesses)
    for _, facts, _ in reversed(list(_kept(folder)) if folder is not None else []):
        if facts.get("device") == device:
            took = facts.get("case_seconds", {})
            found |= {name: seconds for name, seconds in took.items() if name in found}
    return found


def _kept(folder: Path) -> Iterable[tuple[Path, dict[str, Any], list[Result | ModelResult]]]:
    """Runs in ``folder``, the newest first; what cannot be read is the report's business."""
    found = []
    for path in folder.glob("*.jsonl"):
        try:
            facts, rows = results.read(path)
            found.append((facts["date"], path, facts, rows))
        except (ValueError, KeyError, OSError):
            continue
    for _, path, facts, rows in sorted(found, key=lambda run: run[:2], reverse=True):
        yield path, facts, rows
