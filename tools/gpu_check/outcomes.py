"""The file in which ``tests/outcomes.py`` notes how tests end, a JSON line each time one begins or
ends."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Exit code of a process whose GPU context is of no use any more.
LOST = 86
#: Of so many failing tests the record has all that they said, and so many characters of it.
_TEXTS, MOST_TEXT = 10, 4000


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
