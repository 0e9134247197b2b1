"""The benchmark's cases at sizes that a test can afford."""

from __future__ import annotations

from dataclasses import replace

from attnres_ext.benchmarks.registry import CASES, Case


def shrunk(case: Case, tokens: int = 150, hidden: int = 48) -> Case:
    """The case with fewer tokens and a smaller hidden size."""
    return replace(case, tokens=min(case.tokens, tokens), hidden=min(case.hidden, hidden))


#: One of each kind on the CPU: shapes that differ only in size shrink to the same case.
SMALL_CASES = list({case.name: case for case in map(shrunk, CASES) if case.suite}.values())
