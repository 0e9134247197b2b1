"""What a reader must know before believing a figure, in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attnres_ext.benchmarks import wording
from attnres_ext.benchmarks.report.kept import Kept, Run


def notices(kept: Kept, csrc_sha256: str | None) -> list[str]:
    """Sentences on where figures are missing, old or disturbed; the weightiest first.

    Args:
        kept: the results.
        csrc_sha256: of the present sources; None where there are none to compare with.
    """
    found = []
    for kind, name in (("cuda", "CUDA"), ("cpu", "CPU")):
        runs = [run for run in kept.runs if run.facts["device"].startswith(kind)]
        found += _age(name, runs, csrc_sha256)
    if csrc_sha256 is None:
        found.append(
            "This report was made outside of a checkout, so nobody compared the results with the "
            "present sources; the hashes of what was measured are below."
        )
    modified = [run for run in kept.runs if run.facts.get("modified")]
    if modified:
        found.append(
            f"{_count(len(modified), 'run')} measured a checkout with changes that no commit "
            f"holds: {_names(modified)}."
        )
    found += _disturbed(kept.runs)
    return found


def _age(name: str, runs: Sequence[Run], csrc_sha256: str | None) -> list[str]:
    if not runs:
        gpu = (
            ": as far as these files say, no kernel has run on a GPU yet" if name == "CUDA" else ""
        )
        return [f"There is no {name} result{gpu}."]
    if csrc_sha256 is None:
        return []
    if any(run.facts.get("csrc_sha256") == csrc_sha256 for run in runs):
        return []
    newest = runs[-1]
    return [
        f"There is no {name} result for the present csrc/. The newest is of "
        f"{newest.date[:10]}, {wording.version(newest.facts)}, and measured older code."
    ]


def _disturbed(runs: Iterable[Run]) -> list[str]:
    found = []
    for run in runs:
        timed = [row for row in run.rows if row.status == "timed"]
        shared = [row for row in timed if (row.preemptions or 0) > len(row.samples)]
        if 5 * len(shared) > len(timed):
            found.append(
                f"In {run.name}, {len(shared)} of {len(timed)} measurements shared their cores "
                "with other processes; figures are only as good as the machine was quiet."
            )
    return found


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs)
