"""``attnres bench``: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from attnres_ext.benchmarks import bandwidth, memory, model_registry, registry, results, runner
from attnres_ext.benchmarks.model_registry import ModelCase
from attnres_ext.benchmarks.registry import Case
from attnres_ext.cli import bench as bench_command
from attnres_ext.cli.main import main

TINY = (
    Case("depth_attention", 3, 20, 16, "float32", suite="quick"),
    Case("merge_partial", 3, 20, 16, norm=True, suite="quick", rivals=("eager", "standard")),
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
    (path,) = out.iterdir()
    assert str(path) in printed
    run, rows = results.read(path)
    assert run["suite"] == "quick"
    assert run["command"] == f"attnres bench --repeats 2 --out {out}"
    assert run["threads"] >= 1
    assert run["pages_kept"] is True
    assert run["copy_gbps_by_mib"]["1"] > 0
    contestants = [(row.operator, row.contestant) for row in rows]
    assert ("merge_partial", "standard") in contestants
    assert ("depth_attention", "copy") in contestants
    assert ("depth_attention", "ours") in contestants
    assert not any(row.status in ("wrong", "failed") for row in rows), rows


def test_filter_contestants_threads_and_allocator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = bench(
        "--suite", "ops", "--filter", "depth_attention", "--contestants", "eager", "--threads", 1,
        "--repeats", 2, "--cold", "--allocator", "system", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    (path,) = tmp_path.iterdir()
    run, rows = results.read(path)
    assert (run["threads"], run["cache"], run["pages_kept"]) == (1, "cold", False)
    assert {row.operator for row in rows} == {"depth_attention"}
    assert {row.contestant for row in rows} == {"copy", "eager"}
    assert "caches cold" in capsys.readouterr().out


def test_suites_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suite, works in (("model", {"train"}), ("decode", {"prefill", "decode"})):
        assert bench("--suite", suite, "--repeats", 2, "--out", tmp_path / suite) == 0
        printed = capsys.readouterr().out
        assert "over standard" in printed
        assert "fla was not timed: flash-linear-attention has CUDA kernels alone" in printed
        (path,) = (tmp_path / suite).iterdir()
        assert path.name.startswith(f"cpu-{suite}-")
        run, rows = results.read_models(path)
        assert run["suite"] == suite
        assert {row.work for row in rows} == works
        assert results.read(path)[1] == []


def test_the_suite_of_everything_has_operators_and_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--filter", "*32*", "--contestants", "ours", "--repeats", 2, "--out", tmp_path)
    assert bench("--suite", "all", *arguments) == 0
    assert "training step" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert {row.contestant for row in results.read(path)[1]} == {"copy", "ours"}
    models = results.read_models(path)[1]
    assert {row.contestant for row in models} == {"standard", "ours"}
    assert {row.residual for row in models} == {"standard", "block", "full"}


def test_starts_no_case_once_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 1.0, 30.0))
    monkeypatch.setattr(bench_command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert bench("--repeats", 2, "--seconds", 20, "--contestants", "eager") == 0
    printed = capsys.readouterr().out
    assert "1 of 2 cases were left out after 20 s" in printed
    assert "merge_partial" not in printed


def test_what_the_host_gets_through(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--suite", "ops", "--filter", "*M1-*", "--repeats", 2, "--contestants", "ours")
    assert bench(*arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"ours .* [\d,]+/s ", printed), printed
    assert "copy by buffer size" in printed


def test_list_names_the_cases_and_runs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--list", "--suite", "ops") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == [case.name for case in TINY]
    assert "contestant fla: " in printed.err
    assert bench("--list", "--suite", "decode") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [case.name for case in TINY_MODELS[1:]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "tpu"], "--device is tpu, expected cpu, cuda or cuda:1"),
        (["--device", "cuda"], "--device cuda cannot be used: "),
        (["--filter", "nothing"], "no case of suite 'quick' matches 'nothing'"),
        (["--contestants", "ours,fastest"], "contestant 'fastest' is not one of ours, eager"),
        (["--threads", "100000"], "--threads is 100000, but this machine has"),
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


def test_out_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert bench("--out", tmp_path / "file") == 2
    assert "cannot be made" in capsys.readouterr().err


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
