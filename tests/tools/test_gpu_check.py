"""``make gpu-check`` without a GPU: what it runs, what it makes of the outcome, what it writes."""

from __future__ import annotations

import json
import math
import os
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnres_ext.benchmarks import model_registry
from tools.gpu_check import (
    build,
    command,
    parts,
    process,
    python,
    record,
    sanitizer,
    testing,
)  # fmt: skip
from tools.gpu_check.process import ROOT, Finished, Setting

H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": 90}
FOUND = {
    "python": [3, 12],
    "suffix": ".so",
    "includes": ["/include"],
    "packages": "/packages",
    "missing": [],
    "torch": "2.10.1+cu130",
    "cuda": "13.0",
    "warning": "",
    "gpus": [H100],
}
FACTS = {
    "commit": "0123456789",
    "modified": False,
    "machine": {"gpu": H100["name"], "compute_capability": 90, "driver": "580.1"},
    "versions": {"torch": FOUND["torch"]},
    "library_sha256": "abc",
    "library_sets": ["80", "90"],
}
CASE = {
    "kind": "result", "case": "depth_attention/N9", "contestant": "ours", "status": "timed",
    "seconds": 2e-4,
}  # fmt: skip
COPY = {**CASE, "contestant": "copy", "seconds": 1e-4}
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


class Machine:
    """Stands in for a machine with a GPU: answers each program as it would be answered there."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self.seconds: list[float] = []
        self.found: dict[str, Any] = dict(FOUND)
        self.architectures = "80,90"
        self.built_from = build.sources().source_hash(ROOT)
        self.outcomes = {"tests/ops/test_a.py::test[cuda]": ("passed", "")}
        self.code = 0
        self.times_out = False
        self.sanitizer_says = CLEAN
        self.rows = [COPY, CASE]

    def __call__(
        self,
        arguments: Sequence[str],
        seconds: float,
        log: Path,
        environment: Mapping[str, str],
        patience: float = math.inf,
    ) -> Finished:
        self.commands.append(list(arguments))
        self.environments.append(environment)
        self.seconds.append(seconds)
        log.write_text("what it printed")
        answers: dict[str, Callable[[list[str]], str]] = {
            "bench": self._bench,
            "pytest": self._pytest,
            "probe.log": lambda _: "a warning of torch\n" + json.dumps(self.found),
            "library.log": lambda _: json.dumps([self.architectures, self.built_from]),
            "facts.log": lambda _: json.dumps(FACTS),
        }
        for word, answer in answers.items():
            if word in arguments or word == log.name:
                timed_out = self.times_out and word in ("bench", "pytest")
                return Finished(self.code, answer(list(arguments)), 1.0, timed_out)
        if "-o" in arguments:
            Path(arguments[arguments.index("-o") + 1]).write_text("compiled")
        return Finished(0, "", 1.0)

    def _pytest(self, arguments: list[str]) -> str:
        lines = [
            json.dumps({"test": t, "outcome": outcome, "seconds": 0.1, "reason": reason})
            for t, (outcome, reason) in self.outcomes.items()
        ]
        Path(arguments[arguments.index("--outcomes") + 1]).write_text("\n".join(lines))
        return self.sanitizer_says if "--tool" in arguments else "1 passed"

    def _bench(self, arguments: list[str]) -> str:
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True)
        names = arguments[arguments.index("--baselines") + 1].split(",")
        rows = [row for row in self.rows if row["contestant"] in ("copy", *names)]
        lines = [{"kind": "run", "format": 1, "device": "cuda"}, *rows]
        (out / "cuda-ops.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return "a table"

    def ran(self, word: str) -> list[list[str]]:
        return [arguments for arguments in self.commands if word in arguments]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setenv("PYTHONPATH", "/carried/wheels")
    monkeypatch.setattr(command, "_LOGS", tmp_path / "logs")
    monkeypatch.setattr(sanitizer, "find", lambda _: "/cuda/bin/compute-sanitizer")
    monkeypatch.setattr(python, "candidates", lambda: ["/usr/bin/python3"])
    return Machine()


def kept(out: Path) -> dict[str, Any]:
    """The only record in a folder, beside which there is the archive of its logs."""
    (path,) = out.glob("*.json")
    assert {one.name for one in out.iterdir()} == {path.name, record.archive(path).name}
    return json.loads(path.read_text())


def check(machine: Machine, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = command.main([*arguments, "--out", str(out)], machine)
    return code, kept(out)


def test_everything_passes_and_is_written_down(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = check(machine, tmp_path / "out")
    assert code == 0
    assert found["passed"] is True
    assert found["csrc_sha256"] == machine.built_from
    assert found["kernels"].keys() >= {"sm80/depth_attention", "sm90/depth_attention"}
    assert {k: found[k] for k in FACTS} == FACTS
    assert list(found["parts"]) == [part.name for part in parts.PARTS]
    for part in ("kernels", "tests", "uses", "memcheck"):
        assert found["parts"][part]["tests"] == {"tests/ops/test_a.py::test[cuda]": "passed"}
    assert found["parts"]["headline"]["figures"]["results"] == [COPY, CASE]
    printed = capsys.readouterr().out
    assert "depth_attention/N9 ours: 200.0 µs, 0.50 of copy" in printed
    assert found["parts"]["racecheck"]["errors"] == 0
    assert "is not what ships" not in printed
    # Nothing had to be built but the bindings, and everybody could import the package.
    assert not machine.ran("cmake")
    for arguments, environment in zip(machine.commands, machine.environments, strict=True):
        if "pytest" in arguments or "bench" in arguments:
            first, *others = environment["PYTHONPATH"].split(os.pathsep)
            assert (Path(first) / "attnres_ext" / "ops.py").is_file()
            assert (Path(first) / "attnres_ext" / "benchmarks").is_dir()
            assert others == ["/carried/wheels"]


def test_whatever_is_left_is_a_record_and_an_archive(machine: Machine, tmp_path: Path) -> None:
    old = tmp_path / "logs" / "of-an-earlier-check.log"
    old.parent.mkdir()
    old.write_text("old")
    check(machine, tmp_path / "out", "--parts", "kernels,headline")
    (path,) = (tmp_path / "out").glob("*.tar.gz")
    assert path.name.startswith("gpu-check-nvidia-h100-80gb-hbm3-20")
    with tarfile.open(path) as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert {"probe.log", "facts.log", "kernels-0.jsonl", "cuda-ops.jsonl"} <= names
    assert old.name not in names
    assert not any(name.endswith((".py", ".so")) for name in names)


def test_answers_come_first(machine: Machine, tmp_path: Path) -> None:
    """Ours and the copy before anything of others is compiled, in two minutes."""
    chosen = command.parse(["--parts", "first"])
    assert [part.name for part in chosen.parts] == ["kernels", "headline"]
    assert chosen.seconds <= 120
    check(machine, tmp_path / "out")
    turns = [one[one.index("--baselines") + 1] for one in machine.ran("bench")]
    assert turns == ["ours", *parts.OTHERS, "ours"]
    first = next(i for i, one in enumerate(machine.commands) if "bench" in one)
    assert sum("pytest" in one for one in machine.commands[:first]) <= 6
    # What there is a goal for: the quick suite, in both.
    suites = [one[one.index("--suite") + 1] for one in machine.ran("bench")]
    assert suites == ["quick"] * (1 + len(parts.OTHERS)) + ["all"]


def test_parts_share_the_time_and_can_be_chosen(machine: Machine, tmp_path: Path) -> None:
    _, found = check(machine, tmp_path / "out", "--parts", "tests,headline", "--seconds", "155")
    assert list(found["parts"]) == ["headline", "tests"]
    limits = {
        arguments[2]: limit
        for arguments, limit in zip(machine.commands, machine.seconds, strict=True)
    }
    assert limits["attnres_ext"] == pytest.approx(60, abs=2)
    # The benchmark took no time: the tests get all that is left.
    assert limits["pytest"] == pytest.approx(155, abs=2)
    bench = machine.ran("bench")[0]
    assert int(bench[bench.index("--seconds") + 1]) < limits["attnres_ext"]


def test_the_default_ends_within_nine_minutes_whoever_takes_all_of_his_time() -> None:
    chosen = command.parse([])
    left = chosen.seconds
    assert left <= 9 * 60 - 20
    for number, part in enumerate(chosen.parts):
        seconds = command.share_of(left, chosen.parts[number:])
        assert seconds == pytest.approx(part.seconds)
        left -= seconds
    # Three kernels in a row that hang, and the processes that go on after them.
    assert next(part.seconds for part in parts.PARTS if part.name == "kernels") >= 2 * (20 + 4)
    cases = model_registry.select("all", "cuda", parts.STACKS)
    assert sorted(case.work for case in cases) == ["decode", "reads", "train"]
    assert {case.tokens for case in cases} == {1, 8192}


def test_a_copy_without_git_is_told_its_commit(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = 40 * "a"
    for commit in (None, FACTS["commit"]):
        monkeypatch.setitem(FACTS, "commit", commit)
        out = tmp_path / str(commit)
        _, found = check(machine, out, "--parts", "tests", "--commit", given)
        assert (found["commit"], found["modified"]) == (given, None)
    with pytest.raises(SystemExit):
        command.parse(["--commit", "main"])


def test_a_library_of_one_set_is_checked_and_called_what_it_is(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(FACTS, "library_sets", ["90"])
    _, found = check(machine, tmp_path / "out", "--parts", "tests")
    assert found["library_sets"] == ["90"]
    assert "is not what ships: it lacks the kernels of 80" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "results"
    assert command.main(["--out", str(out)], machine) == 2
    assert capsys.readouterr().err == f"gpu-check: --out {out} cannot be made: Not a directory\n"
    assert machine.commands == []


def test_a_failing_test_is_named(machine: Machine, tmp_path: Path) -> None:
    machine.outcomes = {"a": ("passed", ""), "b": ("failed", "error 1 > 0"), "c": ("skipped", "no")}
    code, found = check(machine, tmp_path / "out", "--parts", "tests")
    assert code == 1
    entry = found["parts"]["tests"]
    assert (entry["status"], entry["reason"]) == ("failed", "b")
    assert entry["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert "\n    b: error 1 > 0" in record.summary(entry)
    assert entry["reasons"] == {"b": "error 1 > 0", "c": "no"}
    assert found["passed"] is False


def test_a_crash_is_not_a_pass(machine: Machine, tmp_path: Path) -> None:
    machine.code = 0
    machine.outcomes = {}
    code, found = check(machine, tmp_path / "out", "--parts", "tests")
    assert code == 1
    assert found["parts"]["tests"]["reason"] == "ended with code 0: 1 passed"


def test_running_out_of_time_keeps_what_there_is(machine: Machine, tmp_path: Path) -> None:
    machine.times_out = True
    code, found = check(machine, tmp_path / "out", "--parts", "headline,tests,memcheck")
    assert code == 1
    for part in ("headline", "tests", "memcheck"):
        assert found["parts"][part]["status"] == "out of time"
    assert found["parts"]["tests"]["counts"] == {"passed": 1}
    assert found["parts"]["headline"]["figures"]["results"] == [COPY, CASE]


def test_a_wrong_result_of_the_benchmark_fails(machine: Machine, tmp_path: Path) -> None:
    machine.rows = [{**CASE, "status": "wrong", "reason": "output 0 is off by 1"}]
    code, found = check(machine, tmp_path / "out", "--parts", "headline")
    assert code == 1
    assert (
        found["parts"]["headline"]["reason"] == "ours in depth_attention/N9: output 0 is off by 1"
    )
    # Somebody else's mistake is not ours.
    machine.rows = [CASE, {**CASE, "contestant": "fla", "status": "wrong", "reason": "off"}]
    code, found = check(machine, tmp_path / "other", "--parts", "headline,others")
    assert (code, found["parts"]["others"]["status"]) == (0, "passed")
    assert found["parts"]["others"]["figures"]["results"] == machine.rows[1:]


def test_the_sanitizer_is_found_where_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(sanitizer, "_TOOLKITS", ())

    def install(folder: Path) -> str:
        folder.mkdir(parents=True)
        program = folder / "compute-sanitizer"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        return str(program)

    packages = tmp_path / "packages"
    assert sanitizer.find(packages) is None
    from_wheel = install(packages / "nvidia" / "cu13" / "bin")
    assert sanitizer.find(packages) == from_wheel
    from_toolkit = install(tmp_path / "cuda" / "bin")
    assert sanitizer.find(packages) == from_toolkit


@pytest.mark.parametrize(
    ("output", "count"),
    [
        (CLEAN, 0),
        ("========= ERROR SUMMARY: 3 errors\n", 3),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
        ("========= ERROR SUMMARY: 1 error\n========= ERROR SUMMARY: 2 errors\n", 3),
        ("========= Device not supported\n", None),
    ],
)
def test_errors_of_the_sanitizer_are_counted(output: str, count: int | None) -> None:
    assert sanitizer.found_errors(output) == count


def test_what_the_sanitizer_finds_fails(machine: Machine, tmp_path: Path) -> None:
    machine.sanitizer_says = (
        "========= COMPUTE-SANITIZER\n"
        "========= Invalid __global__ read of size 16 bytes\n"
        "=========     at depth_attention_forward_kernel\n"
        "========= ERROR SUMMARY: 1 error\n"
    )

    def run(arguments: Sequence[str], *rest: Any) -> Finished:
        finished = machine(arguments, *rest)
        code = 77 if "--tool" in arguments else 0
        return Finished(code, finished.output, finished.seconds)

    code = command.main(["--parts", "memcheck", "--out", str(tmp_path / "out")], run)
    entry = kept(tmp_path / "out")["parts"]["memcheck"]
    assert code == 1
    assert (entry["status"], entry["errors"]) == ("failed", 1)
    assert entry["reason"] == "Invalid __global__ read of size 16 bytes"


def test_without_the_sanitizer_it_says_so(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda _: None)
    code, found = check(machine, tmp_path / "out", "--parts", "synccheck")
    assert code == 0
    assert found["passed"] is False
    entry = found["parts"]["synccheck"]
    assert entry["status"] == "unavailable"
    assert "compute-sanitizer is not on the PATH" in entry["reason"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gpus": []}, "has torch 2.10.1+cu130, which sees no NVIDIA GPU\n"),
        (
            {"gpus": [], "warning": "The NVIDIA driver on your system is too old"},
            "which sees no NVIDIA GPU (The NVIDIA driver on your system is too old)",
        ),
        (
            {"gpus": [], "cuda": None, "torch": "2.13.0+cpu"},
            "has torch 2.13.0+cpu, which was built without CUDA",
        ),
        ({"torch": "2.9.1"}, "has torch 2.9.1, expected 2.10 or later"),
        ({"missing": ["pytest", "rich"]}, "-m pip install pytest rich` gets them"),
        ({"gpus": [{"name": "Tesla V100", "capability": 70}]}, "has compute capability 7.0"),
    ],
)
def test_machines_that_cannot_check_get_a_sentence(
    machine: Machine,
    tmp_path: Path,
    change: dict[str, Any],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine.found.update(change)
    assert command.main(["--out", str(tmp_path / "out")], machine) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_of_many_pythons_the_nearest_one_is_complained_about(tmp_path: Path) -> None:
    lacking = {"missing": ["torch", "pytest"], "suffix": ".so"}
    answers = {
        "/usr/bin/python3": lacking,
        "/venv/bin/python": {**FOUND, "gpus": []},
        "/other/python": lacking,
    }

    def run(arguments: Sequence[str], *_: object) -> Finished:
        found = answers.get(arguments[0])
        return Finished(int(found is None), json.dumps(found), 0.1)

    with pytest.raises(python.CannotCheckError, match=r"/venv/bin/python has .* no NVIDIA GPU"):
        python.find(["/nowhere", *answers], "cuda", run, tmp_path)
    answers["/cuda/python"] = {**FOUND, "missing": ["rich"]}
    with pytest.raises(python.CannotCheckError, match="/cuda/python lacks rich"):
        python.find(list(answers), "cuda", run, tmp_path)
    answers["/cuda/python"] = FOUND
    assert python.find(list(answers), "cuda", run, tmp_path).path == "/cuda/python"


def test_a_library_that_does_not_fit_is_built_or_refused(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.architectures = "80"
    out = str(tmp_path / "out")
    assert command.main(["--build", "never", "--out", out], machine) == 2
    assert 'it holds the kernels "80", and this GPU takes those of set 90' in (
        capsys.readouterr().err
    )
    machine.built_from = "older"
    machine.architectures = "80,90"
    assert command.main(["--build", "never", "--out", out], machine) == 2
    assert "built from other sources" in capsys.readouterr().err
    assert not machine.ran("cmake")


def test_a_library_that_is_missing_is_built_as_it_ships(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    found = python.Python("/usr/bin/python3", FOUND)
    package = tmp_path / "package" / "attnres_ext"
    package.mkdir(parents=True)
    # What the checkout has is a link, and must stay as it is.
    original = tmp_path / "original.so"
    original.write_text("old")
    (package / "_ops.so").symlink_to(original)
    tree = package.parent / "build"
    tree.mkdir()
    (tree / "_ops.so").write_text("new")
    build.build_operators(found, package, True, machine, tmp_path)
    configure, make = machine.commands
    assert "-DATTNRES_CUDA=ON" in configure
    # All sets, as it ships: what is wrong with two of them together shows nowhere else.
    assert not any("ATTNRES_CUDA_ARCHS" in argument for argument in configure)
    assert make[make.index("--target") + 1] == "attnres_ops"
    assert (package / "_ops.so").read_text() == "new"
    assert original.read_text() == "old"


def alive(pid: str) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_programs_are_stopped_with_their_children(tmp_path: Path) -> None:
    script = "echo begun; sleep 60 & echo $!; wait"
    finished = process.run(["sh", "-c", script], 1.5, tmp_path / "log", {})
    assert finished.timed_out
    assert finished.code != 0
    begun, child = finished.output.split()
    assert begun == "begun"
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


def test_programs_get_their_environment_and_keep_their_output(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['GREETING']); sys.exit(3)"
    finished = process.run(
        [sys.executable, "-c", code], 60, tmp_path / "a" / "log", {"GREETING": "x"}
    )
    assert (finished.code, finished.output, finished.timed_out) == (3, "x\n", False)
    assert (tmp_path / "a" / "log").read_text() == "x\n"


def test_outcomes_survive_a_run_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "outcomes"
    line = {"test": "a", "outcome": "passed", "seconds": 1.0, "reason": ""}
    path.write_text(json.dumps(line) + '\n{"test": "b", "outc')
    assert testing.summary([path])["tests"] == {"a": "passed"}
    testing.append(path, {**line, "test": "c", "outcome": "begun"})
    assert testing.summary([path])["tests"] == {"a": "passed", "c": "unfinished"}


def test_a_program_that_prints_nothing_is_stuck(tmp_path: Path) -> None:
    script = "echo begun; sleep 60"
    finished = process.run(["sh", "-c", script], 50, tmp_path / "log", {}, 0.5)
    assert (finished.stuck, finished.timed_out) == (True, False)
    assert finished.output == "begun\n"
    # It may take its time, as long as it says something.
    script = "for i in 1 2 3 4 5; do echo $i; sleep 0.3; done"
    finished = process.run(["sh", "-c", script], 50, tmp_path / "log", {}, 1.0)
    assert (finished.stuck, finished.code) == (False, 0)
    # The first output may take longer.
    finished = process.run(["sh", "-c", "sleep 1; echo"], 50, tmp_path / "log", {}, 0.1)
    assert (finished.stuck, finished.code) == (False, 0)


HOSTILE = """
import os, sys, time
from types import SimpleNamespace
import pytest

@pytest.mark.parametrize("size", range(4))
def test_hangs(size):
    if size in (0, 2):
        time.sleep(600)

@pytest.mark.parametrize("size", range(3))
def test_crashes(size):
    if size == 1:
        os.abort()

def test_fails():
    assert 1 + 1 == 3

def test_loses_the_gpu():
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")
    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=lost)
    sys.modules["torch"] = SimpleNamespace(cuda=cuda)
    lost()

@pytest.mark.parametrize("size", range(3))
def test_passes(size):
    pass
"""


def setting_in(tmp_path: Path) -> Setting:
    this = python.Python(sys.executable, FOUND)
    return Setting(this, "cpu", ROOT / "python" / "attnres_ext", tmp_path, process.run)


def test_what_a_test_takes_along_is_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes that share the tests: each has its turn, and the record says which hung."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    (tmp_path / "test_hostile.py").write_text(HOSTILE)
    paths = [str(tmp_path / "test_hostile.py")]
    suite = testing.Suite("hostile", paths, patience=1.5, processes=2)
    entry, ended = testing.run(setting_in(tmp_path), suite, 100)
    names = {name.split("::")[-1]: outcome for name, outcome in entry["tests"].items()}
    failing = {"test_hangs[0]", "test_hangs[2]", "test_crashes[1]", "test_fails"}
    failing |= {"test_loses_the_gpu"}
    passing = {"test_hangs[1]", "test_hangs[3]", "test_crashes[0]", "test_crashes[2]"}
    passing |= {f"test_passes[{size}]" for size in range(3)}
    assert names == {**dict.fromkeys(failing, "failed"), **dict.fromkeys(passing, "passed")}
    assert entry["collected"] == len(names)
    assert entry["counts"] == {"passed": len(passing), "failed": len(failing)}
    assert entry["status"] == "failed"
    reasons = {name.split("::")[-1]: reason for name, reason in entry["reasons"].items()}
    assert reasons["test_hangs[0]"] == "did not end within 2 s"
    assert reasons["test_crashes[1]"] == "its process was ended by SIGABRT"
    assert reasons["test_fails"] == "assert (1 + 1) == 3"
    assert reasons["test_loses_the_gpu"].endswith(
        "(no call after it: CUDA error: an illegal memory access was encountered)"
    )
    assert "assert 1 + 1 == 3" in "\n".join(entry["texts"].values())
    # A process for each test that took one along, and two for the rest.
    assert len(ended) == 6
    mine, others = (
        [line["test"] for line in testing.read_lines(path) if "test" in line]
        for path in sorted(tmp_path.glob("*.jsonl"))
    )
    assert not {*mine} & {*others}
    assert {*mine} | {*others} == {*entry["tests"]}
    # What has lost a process comes last.
    assert "test_hangs[2]" in mine[-1]


def test_tests_that_were_not_reached_are_counted(tmp_path: Path) -> None:
    def run(arguments: Sequence[str], *_: Any) -> Finished:
        path = Path(arguments[arguments.index("--outcomes") + 1])
        for line in ({"collected": 12}, {"test": "a", "outcome": "begun"}):
            testing.append(path, line)
        return Finished(-15, "", 4.0, timed_out=True)

    setting = replace(setting_in(tmp_path), run=run)
    entry, _ = testing.run(setting, testing.Suite("hostile", []), 4)
    assert entry["status"] == "out of time"
    assert entry["tests"] == {"a": "unfinished"}
    assert "1 unfinished, 11 not reached" in record.summary(entry)


def bench_machine(machine: Machine, hostile: str, how: dict[str, Any]) -> Any:
    """A benchmark of four cases of which one takes its process along, whoever runs in it."""
    cases = ["a/N1", "b/N2", "c/N3", "d/N4"]

    def run(arguments: Sequence[str], seconds: float, log: Path, *rest: Any) -> Finished:
        if "bench" not in arguments:
            return machine(arguments, seconds, log, *rest)
        machine.commands.append(list(arguments))
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True)
        who = arguments[arguments.index("--baselines") + 1].split(",")[0]
        without = ()
        if "--without" in arguments:
            without = arguments[arguments.index("--without") + 1].split(",")
        lines, said, code = [{"kind": "run", "format": 1, "device": "cuda"}], ["4 cases"], 0
        for case in cases:
            if case in without:
                continue
            said += [f"case {case}", f"  checking {who}"]
            row = {**CASE, "case": case, "contestant": who}
            if case == hostile:
                code = how.get("code", -9)
                if "rows" in how:
                    lines.append({**row, "status": "failed", "reason": "lost"})
                    said.append(f"{len(lines) - 1}/4  {case}: 1 s; about 0 s left")
                break
            lines.append(row)
            said.append(f"{len(lines) - 1}/4  {case}: 1 s; about 0 s left")
        if len(lines) > 1:
            (out / "cuda-ops.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return Finished(code, "\n".join(said), 1.0, stuck=how.get("stuck", code < 0))

    return run


@pytest.mark.parametrize(
    ("part", "how", "lost", "code"),
    [
        ("headline", {}, {"b/N2": "nothing happened any more while checking ours"}, 1),
        ("headline", {"code": 1}, {"b/N2": "it ended with 1 while checking ours"}, 1),
        # The case could still be written, and says what went wrong.
        ("headline", {"code": 1, "rows": True}, {}, 1),
        # Somebody else's kernel hangs, or takes too long to compile: noted, and no failure of ours.
        ("others", {}, {"b/N2": "nothing happened any more while checking liger"}, 0),
    ],
)  # fmt: skip
def test_a_case_takes_its_own_process_along(
    machine: Machine, tmp_path: Path, part: str, how: dict[str, Any], lost: dict[str, str],
    code: int,
) -> None:  # fmt: skip
    run = bench_machine(machine, "b/N2", how)
    assert command.main(["--parts", part, "--out", str(tmp_path / "out")], run) == code
    entry = kept(tmp_path / "out")["parts"][part]
    assert entry["lost"] == lost
    timed = [row["case"] for row in entry["figures"]["results"] if row["status"] == "timed"]
    turns = len(parts.OTHERS) if part == "others" else 1
    assert timed == turns * ["a/N1", "c/N3", "d/N4"]
    assert len(machine.ran("bench")) == 2 * turns
    if how.get("rows"):
        assert entry["reason"] == "ours in b/N2: lost"


def test_a_benchmark_that_cannot_begin_is_not_begun_for_ever(
    machine: Machine, tmp_path: Path
) -> None:
    def run(arguments: Sequence[str], *rest: Any) -> Finished:
        finished = machine(arguments, *rest)
        return Finished(2, "attnres bench: no", 1.0) if "bench" in arguments else finished

    machine.rows = []
    assert command.main(["--parts", "headline", "--out", str(tmp_path / "out")], run) == 1
    assert len(machine.ran("bench")) == 1
    entry = kept(tmp_path / "out")["parts"]["headline"]
    assert entry["reason"] == "ended with code 2: attnres bench: no"


@pytest.mark.slow
def test_rehearsal_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same program, packages, tests and files, with the CPU in the place of the GPU."""
    monkeypatch.setattr(command, "_LOGS", tmp_path / "logs")
    # A library that was built before the last change of csrc/ is good enough for this.
    monkeypatch.setattr(build, "complaint", lambda *_: None)
    some = "tests/ops/test_merge_partial.py"
    monkeypatch.setattr(
        testing,
        "run",
        lambda setting, suite, seconds, real=testing.run: real(
            setting,
            replace(suite, paths=[some], options=[*suite.options, "-k", "test_no_tokens"]),
            seconds,
        ),
    )
    arguments = ["--device", "cpu", "--python", sys.executable, "--out", str(tmp_path / "out")]
    code = command.main([*arguments, "--parts", "tests,memcheck"])
    found = kept(tmp_path / "out")
    assert code == 0, found["parts"]
    assert found["device"] == "cpu"
    assert found["parts"]["tests"]["counts"].keys() == {"passed"}
    assert all(test.startswith(some) for test in found["parts"]["tests"]["tests"])
    assert found["parts"]["memcheck"]["status"] == "unavailable"
    assert found["commit"]
    assert found["machine"]["cores"] >= 1
