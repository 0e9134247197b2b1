"""What a reader must know before believing a figure, in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnres_ext import sources

from .. import results, wording
from .kept import Kept, Run


def notices(kept: Kept, present: Mapping[str, Any] | None) -> list[str]:
    """Sentences on where figures are missing, old or disturbed; the weightiest first.

    Args:
        kept: the results.
        present: hashes of the present sources (:func:`sources.hashes`); None where there are none
            to compare with.
    """
    found = []
    for kind, name in (("cuda", "CUDA"), ("cpu", "CPU")):
        runs = [run for run in kept.runs if run.facts["device"].startswith(kind)]
        found += _age(name, runs, present)
    if present is None:
        found.append(
            "This report was made outside of a checkout, so nobody compared the results with the "
            "present sources; the hashes of what was measured are below."
        )
    modified = [run for run in kept.runs if run.facts.get("modified")]
    if modified:
        found.append(
            f"{_count(len(modified), 'run')} measured a checkout with changes that no commit "
            f"holds: {_names(run.name for run in modified)}."
        )
    found += _unfinished(kept.runs)
    # What newer runs have replaced is shown in histories alone, which know about noise.
    newest = [
        pair
        for each in (kept.newest, kept.newest_models)
        for at in kept.places
        for pair in each(at)
    ]
    shown = {id(run) for run, _ in newest}
    found += _disturbed(run for run in kept.runs if id(run) in shown)
    return found


def _age(name: str, runs: Sequence[Run], present: Mapping[str, Any] | None) -> list[str]:
    if not runs:
        gpu = (
            ": as far as these files say, no kernel has run on a GPU yet" if name == "CUDA" else ""
        )
        return [f"There is no {name} result{gpu}."]
    if present is None:
        return []
    if not any(sources.is_current(run.facts, present) for run in runs):
        newest = runs[-1]
        return [
            f"There is no {name} result for the present csrc/. The newest is of "
            f"{newest.when()[:10]}, {wording.version(newest.facts)}, and measured older code."
        ]
    last = {(run.place, case): run for run in runs for case in (*run.by_case, *run.models_by_case)}
    old = [run for run in last.values() if not sources.is_current(run.facts, present)]
    if not old:
        return []
    return [
        f"{len(old)} of {len(last)} {name} cases were last measured with older code than the "
        f"present csrc/: {_names(dict.fromkeys(run.name for run in old))}."
    ]


def _unfinished(runs: Iterable[Run]) -> list[str]:
    found = []
    for run in runs:
        wanted, done = run.facts.get("cases", 0), len(run.by_case) + len(run.models_by_case)
        if done < wanted:
            found.append(f"{run.name} ended after {done} of {_count(wanted, 'case')}.")
    return found


def _disturbed(runs: Iterable[Run]) -> list[str]:
    found = []
    for run in runs:
        shared, timed = results.shared_cores(run.rows)
        if 5 * shared > timed:
            found.append(
                f"In {run.name}, {wording.shared_cores(shared, timed)}; figures are only as good "
                "as the machine was quiet."
            )
    return found


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
