"""The benchmark in processes that a case may take along: another one goes on after that case."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu_check.process import Finished, Setting

OURS = "ours"
#: What ``attnres bench --steps`` says: a case begins, a step of it begins, a case is over.
_LINE = re.compile(r"^(?:case (?P<case>\S+)|  (?P<step>.+)|(?P<over>\d+/\d+)  .*)$")


def run(
    setting: Setting,
    part: str,
    seconds: float,
    baselines: Sequence[str],
    arguments: Sequence[str],
    patience: float,
) -> dict[str, Any]:
    """Runs ``attnres bench``, whose file is rewritten after each case.

    Args:
        setting: what all parts share.
        part: its name.
        seconds: that it may take.
        baselines: whose turn it is, one after the other; each entry names one or, with commas,
            several. Each takes at most half of the time that is left, the last one all of it.
        arguments: of the benchmark, in addition.
        patience: seconds that a step of a case may take, such as compiling for it.

    Returns:
        The part's entry in the record: ``figures``, and ``lost``, the cases that took their process
        along, with the step in which they did.
    """
    begin = time.monotonic()
    lost: dict[str, str] = {}
    ended: list[Finished] = []
    for number, names in enumerate(baselines, start=1):
        now = time.monotonic()
        left = begin + seconds - now
        end = now + (left if number == len(baselines) else left / 2)
        command = ["--baselines", names, *arguments]
        ended.append(_turn(setting, f"{part}-{number}", command, end, patience, lost))
    facts, rows = _read(setting.logs, part)
    entry: dict[str, Any] = {"seconds": time.monotonic() - begin, "lost": lost}
    if facts is not None:
        entry["figures"] = {"run": facts, "results": rows}
    return {**entry, **_verdict(lost, rows, ended, OURS in baselines)}


def _turn(
    setting: Setting,
    name: str,
    arguments: Sequence[str],
    end: float,
    patience: float,
    lost: dict[str, str],
) -> Finished:
    """Processes until every case was begun; adds to ``lost`` those that did not end."""
    begun: list[str] = []
    while True:
        left = max(1.0, end - time.monotonic())
        out = f"{name}-{len(begun)}"
        # The tables come at the end; where the time is over before, the file has it all.
        command = [
            setting.python.path, "-m", "attnres_ext", "bench", "--device", setting.device,
            *arguments, "--steps", "--seconds", str(max(1, int(0.9 * left))),
            "--out", str(setting.logs / out),
        ]  # fmt: skip
        if begun:
            command += ["--without", ",".join(begun)]
        ended = setting.start(out, command, left, patience=patience)
        lines = [match for match in map(_LINE.match, ended.output.splitlines()) if match]
        cases = [match["case"] for match in lines if match["case"]]
        begun += cases
        if ended.code != 0 and not ended.timed_out and cases and not lines[-1]["over"]:
            why = "nothing happened any more" if ended.stuck else f"it ended with {ended.code}"
            step = lines[-1]["step"]
            lost[cases[-1]] = f"{why} while {step}" if step else why
        if ended.timed_out or ended.code == 0 or not cases:
            return ended


def _read(logs: Path, part: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The first line of the first file, and the results in all of them."""
    facts, rows = None, []
    for path in sorted(logs.glob(f"{part}-*/*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        first, *others = map(json.loads, path.read_text().splitlines())
        facts = facts or first
        rows += others
    return facts, rows


def _verdict(
    lost: dict[str, str], rows: list[dict[str, Any]], ended: Sequence[Finished], ours: bool
) -> dict[str, Any]:
    """``ours``: whether it is about us; somebody else's mistake, or slowness, is not ours."""
    wrong = [
        f"{row['contestant']} in {row['case']}: {row['reason']}"
        for row in rows
        if row["contestant"] == OURS and row["status"] in ("wrong", "failed")
    ]
    wrong += [f"{case}: {why}" for case, why in lost.items() if ours]
    late = any(one.timed_out for one in ended)
    broken = [one for one in ended if one.code != 0 and not one.timed_out and not one.stuck]
    if wrong:
        return {"status": "failed", "reason": wrong[0]}
    if ours and (broken or not (rows or late)):
        return {"status": "failed", "reason": (broken or ended)[0].last_line}
    status = "out of time" if ours and late else "passed"
    return {"status": status, "reason": "the time was over before its end" if late else ""}
