"""Everything that a folder of results holds, read once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import results, tables, wording
from ..results import ModelResult, Result

#: Files of one record each: how they are called, and what they must hold.
_RECORDS = (
    ("training-*.json", ("arms", "steps", "text", "tokens_per_step")),
    (
        "build-*.json",
        ("steps", "libraries", "seconds", "processor_seconds", "jobs", "cuda_archs"),
    ),
    ("gpu-check-*.json", ("parts", "device")),
)


class ReportError(ValueError):
    """Results that no report can be made of; the message is a sentence for people."""


@dataclass(frozen=True)
class Place:
    """Where figures may be compared: one device, as many threads, the same state of the caches, and
    the same way with freed memory."""

    device: str
    processor: str
    threads: int | None
    cache: str
    memory: str

    @property
    def label(self) -> str:
        """For headings."""
        if self.device.startswith("cuda"):
            return f"{self.processor}, inputs {self.cache}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        words = [self.processor, threads, f"caches {self.cache}", self.memory]
        return ", ".join(filter(None, words))


@dataclass(frozen=True)
class Run:
    """One file that ``attnres bench`` wrote."""

    name: str
    facts: dict[str, Any]
    rows: tuple[Result | ModelResult, ...]

    def when(self) -> str:
        """When it began, ISO 8601."""
        return self.facts["date"]

    @property
    def record(self) -> dict[str, Any]:
        """What is said of it, with its name, as of other records."""
        return {**self.facts, "name": self.name}

    @cached_property
    def place(self) -> Place:
        """Where it ran."""
        return Place(
            self.facts["device"],
            wording.processor(self.facts),
            self.facts.get("threads"),
            self.facts.get("cache", "warm"),
            wording.memory(self.facts),
        )

    @cached_property
    def by_case(self) -> dict[str, tables.Rows]:
        """Results of operators by case and who ran."""
        return tables.by_case(row for row in self.rows if isinstance(row, Result))

    @cached_property
    def models_by_case(self) -> dict[str, dict[tuple[str, str], ModelResult]]:
        """Results of models by case, residual and who ran."""
        found: dict[str, dict[tuple[str, str], ModelResult]] = {}
        for row in self.rows:
            if isinstance(row, ModelResult):
                found.setdefault(row.case, {})[row.residual, row.contestant] = row
        return found


@dataclass(frozen=True)
class Kept:
    """A folder of results.

    Attributes:
        folder: where they lie.
        runs: of the benchmark, oldest first.
        trainings: records of training runs, oldest first.
        builds: records of builds, oldest first.
        checks: records of ``make gpu-check``, oldest first.
    """

    folder: Path
    runs: tuple[Run, ...]
    trainings: tuple[dict[str, Any], ...] = ()
    builds: tuple[dict[str, Any], ...] = ()
    checks: tuple[dict[str, Any], ...] = ()

    @property
    def records(self) -> list[dict[str, Any]]:
        """Everything that is no run of the benchmark."""
        return [*self.trainings, *self.builds, *self.checks]

    @cached_property
    def places(self) -> list[Place]:
        """Where anything ran, CPUs first, then in the order of the first run."""
        places = dict.fromkeys(run.place for run in self.runs)
        return sorted(places, key=lambda place: not place.device.startswith("cpu"))

    def at(self, place: Place) -> list[Run]:
        """The runs of one place, oldest first."""
        return [run for run in self.runs if run.place == place]

    def newest(self, place: Place) -> Iterator[tuple[Run, tables.Rows]]:
        """Every operator's case of a place: the newest run that has it, and its rows there."""
        runs = {case: run for run in self.at(place) for case in run.by_case}
        return ((run, run.by_case[case]) for case, run in runs.items())

    def newest_models(
        self, place: Place
    ) -> Iterator[tuple[Run, dict[tuple[str, str], ModelResult]]]:
        """The same for models."""
        runs = {case: run for run in self.at(place) for case in run.models_by_case}
        return ((run, run.models_by_case[case]) for case, run in runs.items())


def load(folder: Path) -> Kept:
    """Reads every result in ``folder``.

    Raises:
        ReportError: there is no such folder, nothing in it, or something that is no result.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ReportError(f"{folder} {what}; `attnres bench --out {folder}` writes results there")
    try:
        runs = [_read_run(path) for path in results.files(folder)]
        records = [
            tuple(
                sorted(
                    (_read_record(path, names) for path in sorted(folder.glob(pattern))),
                    key=lambda one: one["date"],
                )
            )
            for pattern, names in _RECORDS
        ]
    except OSError as error:
        raise ReportError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not runs and not any(records):
        raise ReportError(
            f"{folder} holds no results; `attnres bench --out {folder}` writes results there"
        )
    return Kept(folder, tuple(sorted(runs, key=Run.when)), *records)


def _read_run(path: Path) -> Run:
    try:
        facts, rows = results.read(path)
    except ValueError as error:
        raise ReportError(str(error)) from None
    for name in ("date", "device", "suite", "machine", "versions"):
        if name not in facts:
            raise ReportError(f"{path}, line 1: does not say its {name}")
    return Run(path.name, facts, tuple(rows))


def _read_record(path: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(record, dict):
        raise ReportError(f"{path}: not a record of results")
    for name in ("date", "command", *names):
        if name not in record:
            raise ReportError(f"{path}: does not say its {name}")
    return {**record, "name": path.name}
