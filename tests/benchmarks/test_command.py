"""``attnres bench``: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnres_ext.benchmarks import bandwidth, memory, model_registry, registry, results, runner
from attnres_ext.benchmarks.model_registry import ModelCase
from attnres_ext.benchmarks.registry import Case
from attnres_ext.cli import bench as bench_command
from attnres_ext.cli.main import main

TINY = (
    Case("depth_attention", 3, 20, 16, "float32", suite="quick"),
    Case(
        "merge_partial", 3, 20, 16, norm=True, suite="quick", baselines=("eager", "standard-fused")
    ),
    Case("depth_attention", 3, 1, 8, "float32", origin="host", suite="ops"),
)
TINY_MODELS = tuple(
    ModelCase(work, 4, 32, 48, 2, 8, sublayers_per_block=2, tokens=tokens, context=context)
    for work, tokens, context in (("train", 9, 0), ("prefill", 9, 0), ("decode", 1, 5))
)


@pytest.fixture(autouse=True)
def _tiny_benchmark(monkeypatch: pytest.MonkeyPatch, num_threads: None) -> None:
    monkeypatch.setattr(registry, "CASES", TINY)
    monkeypatch.setattr(model_registry, "CASES", TINY_MODELS)
    monkeypatch.setattr(bandwidth, "LADDER", (1,))
    monkeypatch.setitem(bandwidth.MATRIX_SIZES, "cpu", 64)
    monkeypatch.setattr(runner, "_MOST_SETS", 3)
    # The allocator's settings cannot be taken back; other tests share this process.
    monkeypatch.setattr(memory, "keep_pages", lambda: True)


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


def kept(folder: Path) -> Path:
    """The only run in a folder."""
    (path,) = folder.glob("*.jsonl")
    return path


def test_prints_a_table_and_writes_json_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    assert bench("--repeats", 2, "--out", out) == 0
    printed = capsys.readouterr().out
    for text in (
        "GB/s",
        "depth_attention",
        "merge_partial",
        "standard",
        "% of copy",
        "N3 M20 D16 fp32",
    ):
        assert text in printed
    path = kept(out)
    assert str(path) in printed
    assert "depth_attention" in (out / "report.html").read_text()
    run, rows = results.read(path)
    assert run["suite"] == "quick"
    assert run["command"] == f"attnres bench --repeats 2 --out {out}"
    assert run["threads"] >= 1
    assert run["pages_kept"] is True
    assert run["copy_gbps_by_mib"]["1"] > 0
    assert run["cases"] == len(run["case_seconds"]) == 2
    contestants = [(row.operator, row.contestant) for row in rows]
    assert ("merge_partial", "standard-fused") in contestants
    assert ("depth_attention", "copy") in contestants
    assert ("depth_attention", "ours") in contestants
    assert not any(row.status in ("wrong", "failed") for row in rows), rows


def test_filter_contestants_threads_and_allocator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = bench(
        "--suite", "ops", "--filter", "depth_attention", "--baselines", "eager", "--threads", 1,
        "--repeats", 2, "--cold", "--allocator", "system", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    run, rows = results.read(kept(tmp_path))
    assert (run["threads"], run["cache"], run["pages_kept"]) == (1, "cold", False)
    assert {row.operator for row in rows} == {"depth_attention"}
    assert {row.contestant for row in rows} == {"copy", "eager"}
    assert "caches cold" in capsys.readouterr().out


def test_the_suite_of_everything_has_operators_and_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In a narrow terminal words are folded and figures stay whole.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ("--filter", "*32*", "--baselines", "ours,fla", "--repeats", 2, "--out", tmp_path)
    assert bench("--suite", "all", *arguments) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert re.search(r"[\d.]+ (ms|us)", printed)
    assert "Models" in printed
    assert "fla was not timed: flash-linear-attention has CUDA kernels alone" in printed
    path = kept(tmp_path)
    assert path.name.startswith("cpu-all-")
    run, rows = results.read(path)
    assert run["suite"] == "all"
    models = [row for row in rows if isinstance(row, results.ModelResult)]
    assert {row.contestant for row in rows if row not in models} == {"copy", "ours", "fla"}
    assert {row.work for row in models} == {"train", "prefill", "decode"}
    assert {(row.residual, row.contestant) for row in models if row.seconds} == {
        ("standard", "standard"), ("block", "ours"), ("full", "ours"),
    }  # fmt: skip


def test_starts_no_case_once_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 1.0, 15.0, 30.0))
    monkeypatch.setattr(bench_command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert bench("--repeats", 2, "--seconds", 20, "--baselines", "eager") == 0
    printed = capsys.readouterr().out
    assert "1 of 2 cases were left out after 20 s" in printed
    assert "merge_partial" not in printed


@pytest.mark.parametrize("named", [None, ("ours", "eager"), ("ours",), ("eager",)], ids=str)
def test_on_a_gpu_we_run_before_others_compile(named: tuple[str, ...] | None) -> None:
    for device in ("cuda", "cpu"):
        options = runner.Options(names=named, device=device)
        jobs = bench_command._jobs([*TINY], [*TINY_MODELS], options)
        names = [case.name for case in (*TINY, *TINY_MODELS)]
        first = names if device == "cuda" and named in (None, ("ours", "eager")) else []
        assert [job.name for job in jobs if not job.whole] == first
        assert [job.name for job in jobs] == [*first, *names]


def test_where_it_is_and_how_long_it_takes_goes_to_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--repeats", 2, "--baselines", "ours", "--out", tmp_path)
    assert bench(*arguments) == 0
    first, *others = capsys.readouterr().err.splitlines()
    # Nobody knows yet: a guess. The next run knows from this one.
    assert first == "2 cases, about 6 s left"
    assert re.fullmatch(r"1/2  depth_attention N3 .* forward: \d+ s; about \d+ s left", others[0])
    assert others[1].startswith("2/2  merge_partial")
    assert others[1].endswith("about 0 s left")
    assert bench(*arguments) == 0
    seconds = round(sum(results.read(next(tmp_path.glob("*.jsonl")))[0]["case_seconds"].values()))
    assert capsys.readouterr().err.splitlines()[0] == f"2 cases, about {seconds} s left"


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Ctrl-C in the case after so many; the names of those that were begun."""
    begun: list[str] = []
    real = runner.run_case

    def run(case: Case, *arguments: object) -> list[results.Result]:
        begun.append(case.name)
        if len(begun) == after + 1:
            raise KeyboardInterrupt
        return real(case, *arguments)

    monkeypatch.setattr(runner, "run_case", run)
    return begun


def test_an_interrupted_run_shows_what_it_has_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--suite", "ops", "--repeats", 2, "--baselines", "eager", "--out", tmp_path)
    begun = interrupt(monkeypatch, after=1)
    assert bench(*arguments) == 130
    printed = capsys.readouterr()
    assert "N3 M20 D16 fp32" in printed.out
    assert "2 of 3 cases were left out; the same command with --resume goes on" in printed.out
    assert printed.err.endswith("attnres bench: interrupted\n")
    path = kept(tmp_path)
    before = results.read(path)

    assert bench(*arguments, "--resume") == 0
    printed = capsys.readouterr()
    assert f"going on with {path}: 1 of 3 cases are done" in printed.err
    # The table has the cases of before, too.
    assert "N3 M20 D16 fp32" in printed.out
    assert "merge_partial" in printed.out
    run, rows = results.read(kept(tmp_path))
    assert begun == [TINY[0].name, TINY[1].name, TINY[1].name, TINY[2].name]
    assert rows[: len(before[1])] == before[1]
    assert {row.case for row in rows} == {case.name for case in TINY}
    assert run["date"] == before[0]["date"]
    assert len(run["resumed"]) == 1
    assert "--resume" not in run["command"]

    # Nothing is left to go on with: a run of its own.
    assert bench(*arguments, "--resume") == 0
    assert len(begun) == 7


def test_a_run_of_other_code_or_another_kind_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--repeats", 2, "--baselines", "eager", "--out", tmp_path)
    begun = interrupt(monkeypatch, after=1)
    assert bench(*arguments) == 130
    assert bench(*arguments, "--cold", "--resume") == 0
    assert len(begun) == 4
    monkeypatch.setattr("attnres_ext.benchmarks.machine.commit", lambda root=None: {"commit": "x"})
    assert bench(*arguments, "--resume") == 0
    assert len(begun) == 6


def test_a_disk_that_fills_up_is_one_sentence_after_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    assert bench("--repeats", 2, "--baselines", "eager", "--out", tmp_path) == 2
    printed = capsys.readouterr()
    assert "N3 M20 D16 fp32" in printed.out
    last = printed.err.splitlines()[-1]
    assert last.startswith(f"attnres bench: {tmp_path}/cpu-quick-")
    assert last.endswith(
        "cannot be written (No space left on device); it holds what it held before"
    )
    assert not list(tmp_path.iterdir())


def test_where_nobody_can_run_the_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--baselines", "fla", "--repeats", 2) == 0
    assert re.search(r"fla +│ +absent", capsys.readouterr().out)


def test_what_the_host_gets_through(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--suite", "ops", "--filter", "*M1-*", "--repeats", 2, "--baselines", "ours")
    assert bench(*arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"ours .* [\d,]+/s ", printed), printed
    assert "copy by buffer size" in printed


def test_list_names_the_cases_and_runs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--list", "--suite", "ops") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == [case.name for case in TINY]
    assert "baseline fla: " in printed.err
    left_out = TINY_MODELS[1].name
    assert bench("--list", "--suite", "decode", "--without", left_out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [case.name for case in TINY_MODELS[2:]]


def test_steps_name_what_is_going_on_before_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--steps", "--repeats", 2, "--baselines", "ours", "--filter", TINY[0].name) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:5] == [f"case {TINY[0].name}", "  inputs", "  checking ours", "  timing ours"]


def test_a_lost_gpu_ends_the_run_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert bench("--repeats", 2, "--baselines", "ours", "--out", tmp_path) == 2
    printed = capsys.readouterr().err
    assert (
        f"attnres bench: in case {TINY[0].name} the GPU was lost to this process (CUDA error: an "
        "illegal memory access was encountered); the cases after it were not run\n"
    ) in printed
    assert {row.case for row in results.read(kept(tmp_path))[1]} == {TINY[0].name}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--without", "x/N1"], "--without names 'x/N1', expected some of what `attnres bench"),
        (["--device", "tpu"], "--device is tpu, expected cpu, cuda or cuda:1"),
        (["--device", "cuda"], "--device cuda cannot be used: "),
        (["--filter", "nothing"], "no case of suite 'quick' matches 'nothing'"),
        (["--baselines", "ours,fastest"], "baseline 'fastest' is not one of ours, eager"),
        (["--threads", "100000"], "--threads is 100000, but this machine has"),
        (["--resume"], "--resume needs the folder of the run to go on with: --out DIR"),
        (["--out", "/dev/null/folder"], "--out /dev/null/folder cannot be made: Not a directory"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"attnres bench: {sentence}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--suite", "slow"],
        ["--threads", "0"],
        ["--repeats", "one"],
        ["--repeats", "1"],
        ["--contestants", "ours,ours"],
    ],
)
def test_argparse_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench(*arguments)
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err
