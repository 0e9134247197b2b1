"""The benchmark in processes that a case may take along: another one goes on after that case."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check.process import Finished
from tools.gpu_check.setting import Setting

_STEP = re.compile(r"^(case (?P<case>\S+)|  (?P<step>.+))$")
OURS = "ours"


def run(
    setting: Setting,
    part: str,
    seconds: float,
    contestants: Sequence[str],
    arguments: Sequence[str],
    patience: float,
) -> dict[str, Any]:
    """Runs ``attnres bench``, whose file is rewritten after each case.

    Args:
        setting: what all parts share.
        part: its name.
        seconds: that it may take.
        contestants: whose turn it is, one after the other; each entry names one or, with commas,
            several. Each takes at most half of the time that is left, the last one all of it.
        arguments: of the benchmark, in addition.
        patience: seconds that a step of a case may take, such as compiling for it.

    Returns:
        The part's entry in the record: ``figures``, and ``lost``, the cases that took their process
        along, with the step in which they did.
    """
    begin = time.monotonic()
    shutil.rmtree(setting.logs / part, ignore_errors=True)
    lost: dict[str, str] = {}
    folders: list[Path] = []
    ended: list[Finished] = []
    for number, names in enumerate(contestants, start=1):
        left = begin + seconds - time.monotonic()
        end = time.monotonic() + (left if number == len(contestants) else left / 2)
        command = ["--contestants", names, *arguments]
        ended.append(_one_after_another(setting, part, command, end, patience, folders, lost))
    entry: dict[str, Any] = {"seconds": time.monotonic() - begin, "lost": lost}
    facts, rows = _read(folders)
    if facts is not None:
        entry["figures"] = {"run": facts, "results": rows}
    return {**entry, **_verdict(lost, rows, ended, seconds, OURS in contestants)}


def _one_after_another(
    setting: Setting,
    part: str,
    arguments: Sequence[str],
    end: float,
    patience: float,
    folders: list[Path],
    lost: dict[str, str],
) -> Finished:
    """Processes until every case had its turn; adds to ``folders`` and ``lost``."""
    first, gone = len(folders), set[str]()
    while True:
        left = max(1.0, end - time.monotonic())
        out = setting.logs / part / str(len(folders))
        # The tables come at the end; where the time is over before, the file has it all.
        command = [
            setting.python.path, "-m", "attnres_ext", "bench", "--device", setting.device,
            *arguments, "--steps", "--seconds", str(max(1, int(0.9 * left))), "--out", str(out),
        ]  # fmt: skip
        done = {row["case"] for row in _read(folders[first:])[1]} | gone
        if done:
            command += ["--without", ",".join(sorted(done))]
        ended = setting.start(f"{part}-{len(folders)}", command, left, patience=patience)
        folders.append(out)
        case, step = _last_step(ended)
        finished = {row["case"] for row in _read(folders[first:])[1]}
        died = ended.stuck or ended.code < 0
        if died and not ended.timed_out and case is not None and case not in finished:
            why = "nothing happened any more" if ended.stuck else f"it ended with {ended.code}"
            lost[case] = f"{why} while {step}" if step else why
            gone.add(case)
        if ended.timed_out or ended.code == 0 or finished | gone <= done:
            return ended


def _read(folders: Sequence[Path]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
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
    lost: dict[str, str],
    rows: list[dict[str, Any]],
    ended: Sequence[Finished],
    seconds: float,
    ours: bool,
) -> dict[str, Any]:
    """``ours``: whether it is about us; somebody else's mistake, or slowness, is not ours."""
    wrong = [
        f"{row['contestant']} in {row['case']}: {row['reason']}"
        for row in rows
        if row["contestant"] == OURS and row["status"] in ("wrong", "failed")
    ]
    wrong += [f"{case}: {why}" for case, why in lost.items() if ours]
    if wrong:
        return {"status": "failed", "reason": wrong[0]}
    late = any(one.timed_out for one in ended)
    if late and ours:
        return {"status": "out of time", "reason": f"stopped after {seconds:.0f} s"}
    broken = [one for one in ended if one.code != 0 and not one.timed_out and not one.stuck]
    if ours and (broken or not rows):
        return {"status": "failed", "reason": (broken or list(ended))[0].last_line}
    reason = broken[0].last_line if broken else "not everybody had the time" if late else ""
    return {"status": "passed", "reason": reason}
