"""What a check leaves: one record, and one archive of everything that was printed."""

from __future__ import annotations

import datetime
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tools.gpu_check import build
from tools.gpu_check.process import ROOT

#: Raised when a reader of older records would misread newer ones.
FORMAT = 1
#: So many failures are printed; the record has all of them.
_SHOWN = 12


def make(
    command: str, device: str, facts: dict[str, Any], entries: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The record as it is written; benchmarks/README.md documents it."""
    sources = build.sources()
    return {
        "kind": "gpu-check",
        "format": FORMAT,
        "date": _now().isoformat(timespec="seconds"),
        "command": command,
        "device": device,
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
    return f"gpu-check-{slug}-{_now():%Y-%m-%dT%H%M%SZ}.json"


def write(path: Path, content: dict[str, Any], logs: Path) -> None:
    """Replaces the record, and the archive of logs beside it (:func:`archive`), each at once."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    _replace(path, lambda file: file.write(text.encode()))
    files = sorted(path for path in logs.rglob("*") if path.suffix in (".log", ".jsonl"))

    def pack(file: IO[bytes]) -> None:
        with tarfile.open(fileobj=file, mode="w:gz") as packed:
            for one in files:
                packed.add(one, f"{path.stem}/{one.relative_to(logs)}")

    _replace(archive(path), pack)


def archive(path: Path) -> Path:
    """Where the logs behind a record are."""
    return path.with_name(f"{path.stem}-logs.tar.gz")


def _replace(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            fill(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def summary(entry: dict[str, Any]) -> str:
    """One line for people, then our figures or each failure, then all that the first one said."""
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
    return "\n  ".join([*lines, *_figures(entry.get("figures", {}).get("results", ()))])


def _figures(rows: Any) -> list[str]:
    """A line for each case and contestant: time, and the share of a copy where there is one."""
    copies = {row["case"]: row.get("seconds") for row in rows if row["contestant"] == "copy"}
    lines = []
    for row in rows:
        seconds, copy = row.get("seconds"), copies.get(row["case"])
        if not seconds or row["contestant"] == "copy":
            continue
        of_copy = f", {copy / seconds:.2f} of copy" if copy else ""
        who = " ".join(filter(None, [row.get("residual"), row["contestant"]]))
        lines.append(f"  {row['case']} {who}: {1e6 * seconds:.1f} µs{of_copy}")
    return lines
