"""``make results``: what it runs, in which order, and that an interrupted run is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from attnres_ext.cli.main import make_parser
from tests.tool import load_tool

ROOT = Path(__file__).resolve().parents[2]


tool = load_tool("measure")
NAMES = [part.name for part in tool.PARTS]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tool, "STATE", tmp_path / "build" / "measure.json")
    monkeypatch.setattr(tool, "describe", lambda: {"commit": "a", "modified": False})


class Programs:
    """Stands in for the parts' programs: one of them may end badly."""

    def __init__(self, ends: dict[str, int | type[BaseException]] | None = None) -> None:
        self.ends = ends or {}
        self.ran: list[str] = []

    def __call__(self, command: Sequence[str]) -> int:
        name = next(part.name for part in tool.PARTS if part.command == command)
        self.ran.append(name)
        end = self.ends.get(name, 0)
        if isinstance(end, int):
            return end
        raise end


def test_every_part_runs_once_and_the_next_time_again(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        programs = Programs()
        assert tool.main(programs) == 0
        assert programs.ran == NAMES
    said = capsys.readouterr().err
    assert f"{len(NAMES)} parts, about {sum(part.minutes for part in tool.PARTS)} min" in said
    assert f"part 2 of {len(NAMES)}, bench: 0 min so far" in said
    assert "all done in 0 min" in said


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [(3, 3, "failed with 3"), (130, 130, "interrupted"), (KeyboardInterrupt, 130, "interrupted")],
    ids=str,
)
def test_what_is_done_is_not_done_again(
    end: int | type[BaseException], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(Programs({"training": end})) == code
    assert f"training {'was ' if code == 130 else ''}{words}; the same" in capsys.readouterr().err
    programs = Programs()
    assert tool.main(programs) == 0
    assert programs.ran == NAMES[NAMES.index("training") :]
    assert "done already: build, bench" in capsys.readouterr().err


def test_other_code_is_measured_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tool.main(Programs({"bench": 1})) == 1
    monkeypatch.setattr(tool, "describe", lambda: {"commit": "b", "modified": True})
    programs = Programs()
    assert tool.main(programs) == 0
    assert programs.ran == NAMES


def test_a_damaged_state_is_none() -> None:
    tool.STATE.parent.mkdir()
    tool.STATE.write_text("[]")
    programs = Programs()
    assert tool.main(programs) == 0
    assert programs.ran == NAMES


def test_a_machine_that_is_not_quiet_and_changed_files_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (3.25, 0, 0))
    monkeypatch.setattr(tool, "describe", lambda: {"commit": "b", "modified": True})
    tool.main(Programs())
    said = capsys.readouterr().err
    assert "busy (load average 3.2); results will say so" in said
    assert "files here differ from the commit; results will say so" in said


def test_commands_are_what_the_programs_take() -> None:
    for part in tool.PARTS:
        if part.command[1:3] == ("-m", "attnres_ext"):
            make_parser().parse_args(part.command[3:])
        else:
            assert (ROOT / part.command[1]).is_file()


def test_programs_run_in_the_checkout_on_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    check = "import os; assert os.path.isdir('csrc'); assert 'OMP_NUM_THREADS' not in os.environ"
    assert tool.run([sys.executable, "-c", check]) == 0
    assert tool.run([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_an_interrupted_program_may_finish_its_sentence() -> None:
    """Both get the signal of a terminal; the one above must not kill the other at once."""
    # Where tests run in the background the signal is ignored unless a program asks for it.
    listen = "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    child = (
        f"{listen}try:\n    print('ready', flush=True); time.sleep(20)\n"
        "except KeyboardInterrupt:\n    time.sleep(1); print('what I have', flush=True)"
    )
    parent = (
        f"{listen}import runpy; tool = runpy.run_path({str(ROOT / 'tools/measure.py')!r})\n"
        f"try:\n    tool['run']([sys.executable, '-c', {child!r}])\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # As a terminal does: to all of the group.
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read() == "what I have\ninterrupted\n"
