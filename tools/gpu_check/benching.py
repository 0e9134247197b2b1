"""The benchmark in processes that a case may take along: another one goes on after that case."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.gpu_check.process import Finished

if TYPE_CHECKING:
    from tools.gpu_check.parts import Setting

_STEP = re.compile(r"^(case (?P<case>\S+)|  (?P<step>.+))$")


def run(
    setting: Setting, part: str, seconds: float, patience: float, *arguments: str
) -> dict[str, Any]:
    """Runs ``attnres bench``, whose file is rewritten after each case.

    Args:
        setting: what all parts share.
        part: its name.
        seconds: that it may take.
        patience: seconds that a step of a case may take.
        arguments: of the benchmark, in addition.

    Returns:
        The part's entry in the record: ``figures``, and ``lost``, the cases that took their process
        along, with the step in which they did.
    """
    begin = time.monotonic()
    out = setting.logs / part
    shutil.rmtree(out, ignore_errors=True)
    lost: dict[str, str] = {}
    files: list[Path] = []
    finished: set[str] = set()
    while True:
        left = max(1.0, begin + seconds - time.monotonic())
        turn = out / str(len(files))
        # The tables come at the end; where the time is over before, the file has it all.
        command = [
            setting.python.path, "-m", "attnres_ext", "bench", "--device", setting.device,
            *arguments, "--steps", "--seconds", str(max(1, int(0.9 * left))), "--out", str(turn),
        ]  # fmt: skip
        if finished or lost:
            command += ["--without", ",".join(sorted(finished | lost.keys()))]
        ended = setting.start(f"{part}-{len(files)}", command, left, patience=patience)
        files.append(turn)
        before = len(finished) + len(lost)
        finished |= {row["case"] for row in _read([turn])[1]}
        case, step = _last_step(ended)
        died = ended.stuck or ended.code < 0
        if died and not ended.timed_out and case is not None and case not in finished:
            why = "nothing happened any more" if ended.stuck else f"it ended with {ended.code}"
            lost[case] = f"{why} while {step}" if step else why
        over = ended.timed_out or ended.code == 0
        if over or len(finished) + len(lost) == before:
            break
    entry: dict[str, Any] = {"seconds": time.monotonic() - begin, "lost": lost}
    facts, rows = _read(files)
    if facts is not None:
        entry["figures"] = {"run": facts, "results": rows}
    return {**entry, **_verdict(lost, rows, ended, seconds)}


def _read(folders: list[Path]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The first line of the first file, and the results in all of them."""
    facts, rows = None, []
    for path in (path for folder in folders for path in sorted(folder.glob("*.jsonl"))):
        first, *others = (json.loads(line) for line in path.read_text().splitlines())
        facts = facts or first
        rows += others
    return facts, rows


def _last_step(ended: Finished) -> tuple[str | None, str]:
    """The case that was begun last, and what it was at."""
    case, step = None, ""
    for match in filter(None, map(_STEP.match, ended.output.splitlines())):
        if match["case"]:
            case, step = match["case"], ""
        else:
            step = match["step"]
    return case, step


def _verdict(
    lost: dict[str, str], rows: list[dict[str, Any]], ended: Finished, seconds: float
) -> dict[str, Any]:
    wrong = [
        f"{row['contestant']} in {row['case']}: {row['reason']}"
        for row in rows
        if row["contestant"] == "ours" and row["status"] in ("wrong", "failed")
    ]
    # Somebody else's mistake is not ours.
    wrong += [
        f"{case}: {why}"
        for case, why in lost.items()
        if "while checking" not in why or why.endswith("while checking ours")
    ]
    if wrong:
        return {"status": "failed", "reason": wrong[0]}
    if ended.timed_out:
        return {"status": "out of time", "reason": f"stopped after {seconds:.0f} s"}
    if ended.code != 0 or not rows:
        return {"status": "failed", "reason": ended.last_line}
    return {"status": "passed", "reason": ""}
