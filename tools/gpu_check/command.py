"""Arguments in, parts one by one, a record out."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check import build, parts, process, python
from tools.gpu_check.process import ROOT, Run

#: Raised when a reader of older records would misread newer ones.
FORMAT = 1
RESULTS = ROOT / "benchmarks" / "results"
_LOGS = ROOT / "build" / "gpu-check"

_FACTS = """
import json, torch
from attnres_ext.benchmarks import machine
print(json.dumps({**machine.commit(), "machine": machine.describe(DEVICE), "versions":
                  machine.versions(), "library_sha256": torch.ops.attnres.source_hash()}))
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [part.name for part in parts.PARTS]
    parser = argparse.ArgumentParser(
        prog="gpu-check",
        description="Checks the operators on an NVIDIA GPU and writes one JSON record. Exit code: "
        "0 if everything passed, 1 if something did not, 2 if it cannot be run here.",
    )
    parser.add_argument(
        "--python", metavar="PROGRAM", help="with torch and pytest (default: the first that has)"
    )
    parser.add_argument(
        "--parts",
        default=",".join(names),
        metavar="NAMES",
        help=f"of {', '.join(names)}; separated by commas",
    )
    parser.add_argument(
        "--seconds", type=float, default=510.0, help="for all parts together (default: 510)"
    )
    parser.add_argument(
        "--build",
        choices=["auto", "never"],
        default="auto",
        help="auto builds _ops.so where it is missing or does not fit",
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu rehearses the same tests without a GPU",
    )
    parser.add_argument(
        "--commit", metavar="HASH", help="what these files are, on a machine without their git"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="folder for the record"
    )
    chosen = parser.parse_args(arguments)
    chosen.parts = chosen.parts.split(",")
    if chosen.commit is not None and not re.fullmatch(r"[0-9a-f]{40}", chosen.commit):
        parser.error(f"--commit is '{chosen.commit}', expected 40 hexadecimal digits")
    unknown = [name for name in chosen.parts if name not in names]
    if unknown:
        parser.error(f"--parts names '{unknown[0]}', expected some of {', '.join(names)}")
    if not chosen.seconds > 0:
        parser.error(f"--seconds is {chosen.seconds:g}, expected more than 0")
    return chosen


def main(arguments: Sequence[str] | None = None, run: Run = process.run) -> int:
    """Checks, prints a summary, writes the record.

    Args:
        arguments: of the command line.
        run: starts programs.

    Returns:
        The exit code.
    """
    chosen = parse(arguments)
    try:
        setting = prepare(chosen, run)
        facts = describe(setting)
        if facts["commit"] is None:
            # Whether files differ from it nobody knows there; the hash of csrc/ says what ran.
            facts["commit"] = chosen.commit
    except python.CannotCheckError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    path = chosen.out / file_name(facts)
    entries: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + chosen.seconds
    waiting = [part for part in parts.PARTS if part.name in chosen.parts]
    while waiting:
        part = waiting[0]
        seconds = share_of(end - time.monotonic(), part, waiting)
        print(f"{part.name}: {part.about}, at most {seconds:.0f} s ...", flush=True)
        entries[part.name] = part.check(setting, seconds)
        print(f"  {summary(entries[part.name])}", flush=True)
        # After each part: a check that is interrupted keeps what it has.
        write(path, record(chosen, facts, entries))
        waiting.pop(0)
    print(f"written: {path}")
    good = all(entry["status"] in ("passed", "unavailable") for entry in entries.values())
    return 0 if good else 1


def prepare(chosen: argparse.Namespace, run: Run) -> parts.Setting:
    """Finds a Python and the libraries, or builds them.

    Raises:
        CannotCheckError: there is no GPU, no suitable Python, or no library and no compiler.
    """
    candidates = [chosen.python] if chosen.python else python.candidates()
    found = python.find(candidates, chosen.device, run, _LOGS)
    needed = None
    if chosen.device == "cuda":
        capability = found.gpus[0]["capability"]
        if capability < 80:
            raise python.CannotCheckError(
                f"{found.gpus[0]['name']} has compute capability {capability // 10}."
                f"{capability % 10}, expected 8.0 or later"
            )
        needed = build.kernel_set(capability)
        print(f"{found.gpus[0]['name']}, torch {found.facts['torch']}, {found.path}", flush=True)
    package = python.lay_out(_LOGS / "package")
    why = build.complaint(package / "_ops.so", found, needed, run, _LOGS)
    if why is not None:
        if chosen.build == "never":
            raise python.CannotCheckError(
                f"_ops.so cannot be taken: {why}; leave --build at 'auto' to build it"
            )
        print(f"building _ops.so (minutes): {why}", flush=True)
        build.build_operators(found, package, needed, run, _LOGS)
    if not (package / f"_C{found.facts['suffix']}").exists():
        print(f"building _C for Python {'.'.join(map(str, found.facts['python']))}", flush=True)
        build.build_bindings(found, package, needed or "", run, _LOGS)
    return parts.Setting(found, chosen.device, package, _LOGS, run)


def describe(setting: parts.Setting) -> dict[str, Any]:
    """Where and with what: the same facts as in the benchmark's results."""
    code = _FACTS.replace("DEVICE", repr(setting.device))
    finished = setting.start("facts", [setting.python.path, "-c", code], 120)
    if finished.code != 0:
        last = finished.output.strip().splitlines()[-1:]
        raise python.CannotCheckError(f"the package cannot be imported: {' '.join(last)}")
    return json.loads(finished.output.strip().splitlines()[-1])


def share_of(seconds: float, part: parts.Part, waiting: Sequence[parts.Part]) -> float:
    """How much of the time that is left the part may take: its share among those still waiting."""
    return max(1.0, seconds * part.share / sum(other.share for other in waiting))


def record(
    chosen: argparse.Namespace, facts: dict[str, Any], entries: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The record as it is written; benchmarks/README.md documents it."""
    sources = build.sources()
    return {
        "kind": "gpu-check",
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "tools.gpu_check", *sys.argv[1:]]),
        "device": chosen.device,
        **sources.hashes(ROOT),
        "kernels": sources.kernel_hashes(ROOT),
        **facts,
        "passed": all(entry["status"] == "passed" for entry in entries.values()),
        "parts": entries,
    }


def file_name(facts: dict[str, Any]) -> str:
    """``gpu-check-nvidia-h100-80gb-hbm3-2026-01-31T120000Z.json``."""
    name = facts["machine"].get("gpu") or "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"gpu-check-{slug}-{now:%Y-%m-%dT%H%M%SZ}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


#: So many failures are printed; the record has all of them.
_SHOWN = 12


def summary(entry: dict[str, Any]) -> str:
    """One line for people, then each failure, then all that the first one said."""
    counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(entry.get("counts", {}).items()))
    reached = sum(entry.get("counts", {}).values())
    if reached < entry.get("collected", 0):
        counts += f", {entry['collected'] - reached} not reached"
    words = [f"{entry['status']} in {entry['seconds']:.0f} s", counts, entry["reason"]]
    lines = ["; ".join(word for word in words if word)]
    failed = [test for test, outcome in entry.get("tests", {}).items() if outcome == "failed"]
    lines += [f"  {test}: {entry['reasons'].get(test, '')}" for test in failed[:_SHOWN]]
    if len(failed) > _SHOWN:
        lines.append(f"  and {len(failed) - _SHOWN} more")
    lines += [f"  {case}: {why}" for case, why in entry.get("lost", {}).items()]
    for test, text in list(entry.get("texts", {}).items())[:1]:
        lines += [f"  {test} said:", *(f"    {line}" for line in text.splitlines()[-30:])]
    return "\n  ".join(lines)
