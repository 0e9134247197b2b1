"""Arguments in, parts one by one, a record out."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check import build, parts, process, python, record
from tools.gpu_check.process import ROOT, Run, Setting
from tools.gpu_check.python import CannotCheckError

RESULTS = ROOT / "benchmarks" / "results"
_LOGS = ROOT / "build" / "gpu-check"

_FACTS = """
import json, torch
from attnres_ext.benchmarks import machine
library = torch.ops.attnres
print(json.dumps({
    **machine.commit(), "machine": machine.describe(DEVICE), "versions": machine.versions(),
    "library_sha256": library.source_hash(),
    "library_sets": [*filter(None, library.cuda_architectures().split(","))],
}))
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; its ``parts`` are those to do, its ``seconds`` never None."""
    by_name = {part.name: part for part in parts.PARTS}
    parser = argparse.ArgumentParser(
        prog="gpu-check",
        description="Checks this library on an NVIDIA GPU and writes one JSON record, and one "
        "archive of logs beside it. Exit code: 0 if everything passed, 1 if something did not, 2 "
        "if it cannot be run here.",
    )
    add = parser.add_argument
    add("--python", metavar="PROGRAM", help="with torch and pytest (default: the first that has)")
    add(
        "--parts",
        default=",".join(by_name),
        metavar="NAMES",
        help=f"of {', '.join(by_name)}, separated by commas; 'first' stands for "
        f"{' and '.join(parts.FIRST)}",
    )
    add("--seconds", type=float, help="for all parts (default: their own times, 510 for all)")
    add(
        "--build",
        choices=["auto", "never"],
        default="auto",
        help="auto builds _ops.so where it is missing or does not fit",
    )
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses without a GPU")
    add("--commit", metavar="HASH", help="what these files are, on a machine without their git")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder for the record")
    chosen = parser.parse_args(arguments)
    if chosen.commit is not None and not re.fullmatch(r"[0-9a-f]{40}", chosen.commit):
        parser.error(f"--commit is '{chosen.commit}', expected 40 hexadecimal digits")
    names = list(parts.FIRST) if chosen.parts == "first" else chosen.parts.split(",")
    unknown = [name for name in names if name not in by_name]
    if unknown:
        parser.error(f"--parts names '{unknown[0]}', expected some of {', '.join(by_name)}")
    chosen.parts = [part for part in parts.PARTS if part.name in names]
    if chosen.seconds is None:
        chosen.seconds = sum(part.seconds for part in chosen.parts)
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
        make_folder(chosen.out, "--out")
        setting = prepare(chosen, run)
        facts = describe(setting, chosen.commit)
    except CannotCheckError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    absent = [one for one in build.shipped_sets() if one not in facts["library_sets"]]
    if absent and chosen.device == "cuda":
        print(f"note: this _ops.so is not what ships: it lacks the kernels of {', '.join(absent)}")
    path = chosen.out / record.file_name(facts)
    command = shlex.join(["python", "-m", "tools.gpu_check", *(arguments or sys.argv[1:])])
    entries: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + chosen.seconds
    for number, part in enumerate(chosen.parts):
        seconds = share_of(end - time.monotonic(), chosen.parts[number:])
        print(f"{part.name}: {part.about}, at most {seconds:.0f} s ...", flush=True)
        entries[part.name] = part.check(setting, seconds)
        print(f"  {record.summary(entries[part.name])}", flush=True)
        # After each part: a check that is interrupted keeps what it has.
        record.write(path, record.make(command, chosen.device, facts, entries), setting.logs)
    print(f"written: {path} and {record.archive(path).name}")
    good = all(entry["status"] in ("passed", "unavailable") for entry in entries.values())
    return 0 if good else 1


def share_of(seconds: float, waiting: Sequence[parts.Part]) -> float:
    """How much of the time that is left the first part in ``waiting`` may take."""
    return max(1.0, seconds * waiting[0].seconds / sum(part.seconds for part in waiting))


def make_folder(path: Path, name: str) -> None:
    """Finds out before anything runs that nothing can be written there.

    Raises:
        CannotCheckError: nothing can.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        what = "written to" if path.is_dir() else "made"
        raise CannotCheckError(f"{name} {path} cannot be {what}: {error.strerror}") from None


def prepare(chosen: argparse.Namespace, run: Run) -> Setting:
    """Finds a Python and the libraries, or builds them.

    Raises:
        CannotCheckError: there is no GPU, no suitable Python, or no library and no compiler.
    """
    make_folder(_LOGS, "the folder of logs")
    for old in (path for path in _LOGS.iterdir() if path.name not in ("package", "build")):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    candidates = [chosen.python] if chosen.python else python.candidates()
    found = python.find(candidates, chosen.device, run, _LOGS)
    needed = None
    if chosen.device == "cuda":
        capability = found.gpus[0]["capability"]
        if capability < 80:
            raise CannotCheckError(
                f"{found.gpus[0]['name']} has compute capability {capability // 10}."
                f"{capability % 10}, expected 8.0 or later"
            )
        needed = build.kernel_set(capability)
        print(f"{found.gpus[0]['name']}, torch {found.facts['torch']}, {found.path}", flush=True)
    package = python.lay_out(_LOGS / "package")
    why = build.complaint(package / "_ops.so", found, needed, run, _LOGS)
    if why is not None:
        if chosen.build == "never":
            raise CannotCheckError(
                f"_ops.so cannot be taken: {why}; leave --build at 'auto' to build it"
            )
        print(f"building _ops.so (minutes): {why}", flush=True)
        build.build_operators(found, package, needed is not None, run, _LOGS)
    if not (package / f"_C{found.facts['suffix']}").exists():
        print(f"building _C for Python {'.'.join(map(str, found.facts['python']))}", flush=True)
        build.build_bindings(found, package, run, _LOGS)
    return Setting(found, chosen.device, package, _LOGS, run)


def describe(setting: Setting, commit: str | None) -> dict[str, Any]:
    """Where and with what: the same facts as in the benchmark's results.

    Args:
        setting: what all parts share.
        commit: what the files are, if somebody has said so.

    Raises:
        CannotCheckError: the package cannot be imported.
    """
    code = _FACTS.replace("DEVICE", repr(setting.device))
    finished = setting.start("facts", [setting.python.path, "-c", code], 120)
    if finished.code != 0:
        last = finished.output.strip().splitlines()[-1:]
        raise CannotCheckError(f"the package cannot be imported: {' '.join(last)}")
    facts = json.loads(finished.output.strip().splitlines()[-1])
    if commit is not None and commit != facts["commit"]:
        # Nobody knows whether files differ from it; the hash of csrc/ says what ran.
        facts |= {"commit": commit, "modified": None}
    return facts
