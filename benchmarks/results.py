"""Results as JSON lines.

The first line says where and how, every other line is one contestant in one case.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Raised when a reader of older files would misread newer ones.
FORMAT = 1


@dataclass(frozen=True)
class Result:
    """One contestant in one case. Times are seconds per call.

    Attributes:
        case: the case's name.
        operator: the operator's name.
        shape: its shape, for people.
        work: what one call does, for people.
        origin: where the shape comes from.
        contestant: who, or "copy" for the yardstick.
        status: "timed"; or not timed because "absent" (cannot run here), "unsupported" (does not
            do this), "failed" (raised an error) or "wrong" (the correctness gate refused it).
        reason: why it was not timed.
        seconds: median.
        best_seconds: fastest sample.
        spread: distance between the quartiles, as a share of the median.
        samples: all of them.
        preemptions: how often the system took a core away while this was timed.
        bytes: what the call must move.
        error: largest error as a share of what the gate allows.
    """

    case: str
    operator: str
    shape: str
    work: str
    origin: str
    contestant: str
    status: str
    reason: str = ""
    seconds: float | None = None
    best_seconds: float | None = None
    spread: float | None = None
    samples: tuple[float, ...] = ()
    preemptions: int | None = None
    bytes: int | None = None
    error: float | None = None

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second."""
        return self.bytes / self.seconds if self.bytes and self.seconds else None


def write(path: Path, run: dict[str, Any], results: Iterable[Result]) -> None:
    """Writes a run to ``path``, all of it or nothing.

    Args:
        path: the file; its folder is made.
        run: what is common to all results.
        results: the lines.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"kind": "run", "format": FORMAT, **run}]
    records += [{"kind": "result", **asdict(result)} for result in results]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            for record in records:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """Reads what :func:`write` wrote.

    Raises:
        ValueError: the file is none of ours, or its format is newer than this reader.
    """
    run: dict[str, Any] | None = None
    results = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            kind = record.pop("kind")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{path}, line {number}: not a line of benchmark results") from None
        if kind == "run":
            run = record
            if run.pop("format", None) != FORMAT:
                raise ValueError(f"{path}: written in another format than {FORMAT}")
        else:
            record["samples"] = tuple(record["samples"])
            results.append(Result(**record))
    if run is None:
        raise ValueError(f"{path}: has no line that says where it was measured")
    return run, results
