"""Results survive the way to disk and back, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnres_ext import sources
from attnres_ext.benchmarks import machine, memory, results, runner
from attnres_ext.benchmarks.results import ModelResult, Result

RUN = {"date": "2026-01-01T00:00:00+00:00", "machine": {"cores": 2}, "commit": None}
TIMED = Result(
    case="op/N2/none",
    operator="op",
    shape="N2",
    work="forward",
    origin="host",
    contestant="ours",
    status="timed",
    seconds=0.5,
    best_seconds=0.4,
    spread=0.1,
    samples=(0.4, 0.5, 0.6),
    preemptions=3,
    bytes=10,
    error=0.2,
)
ABSENT = Result(
    "op/N2/none", "op", "N2", "forward", "host", "eager", status="absent", reason="not here"
)
MODEL = ModelResult(
    case="train/L2-D8-T4-fp32",
    work="train",
    residual="block",
    contestant="ours",
    shape="2 layers",
    layers=2,
    hidden=8,
    sublayers_per_block=2,
    blocks=3,
    batch=1,
    tokens=4,
    context=0,
    dtype="float32",
    scaling=("layers", "tokens"),
    origin="demo",
    status="timed",
    seconds=0.5,
    samples=(0.4, 0.6),
    overhead=0.02,
    overhead_quartiles=(0.01, 0.03),
)


def test_operators_and_models_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "run.jsonl"
    results.write(path, RUN, [TIMED, MODEL, ABSENT])
    assert results.read(path) == (RUN, [TIMED, MODEL, ABSENT])
    assert [p.name for p in path.parent.iterdir()] == ["run.jsonl"]


def test_figures_of_a_gpu_check_are_read_part_by_part(tmp_path: Path) -> None:
    def figures(row: Result | ModelResult) -> dict[str, object]:
        path = tmp_path / "part.jsonl"
        results.write(path, RUN, [row])
        run, line = map(json.loads, path.read_text().splitlines())
        return {"status": "passed", "figures": {"run": run, "results": [line]}}

    path = tmp_path / "gpu-check-x.json"
    parts = {
        "tests": {"status": "passed", "tests": {}},
        "headline": figures(TIMED),
        # The yardstick ran again beside others; ours is that of the headline.
        "others": figures(replace(TIMED, seconds=9.0)),
        "models": figures(MODEL),
    }
    path.write_text(json.dumps({"kind": "gpu-check", "parts": parts}))
    assert results.read(path) == (RUN, [TIMED, MODEL])
    other = tmp_path / "gpu-check-y.json"
    other.write_text(json.dumps({"kind": "gpu-check", "parts": {"tests": parts["tests"]}}))
    assert results.files(tmp_path) == [path, tmp_path / "part.jsonl"]
    with pytest.raises(ValueError, match="not a GPU check with figures"):
        results.read(other)


def test_what_becomes_of_freed_memory_is_known_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "keep_pages", lambda: True)
    for name in memory._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert (memory.pages_kept(keep=True), memory.pages_kept(keep=False)) == (True, False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "4000000000")
    assert (memory.pages_kept(keep=True), memory.pages_kept(keep=False)) == (True, None)


def test_reads_results_from_before_a_field_was_added(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    results.write(path, RUN, [TIMED])
    run, row = map(json.loads, path.read_text().splitlines())
    for added in ("operations", "timer"):
        row.pop(added)
    path.write_text(f"{json.dumps(run)}\n{json.dumps(row)}\n")
    assert results.read(path) == (RUN, [TIMED])


@pytest.mark.parametrize(
    ("samples", "preemptions", "shared"),
    [
        ((1e-3,) * 3, 3, False),
        ((1e-3,) * 3, 4, True),
        # Over a second the system has work of its own.
        ((1.0,) * 3, 30, False),
        ((1.0,) * 3, 31, True),
        ((1.0,) * 3, None, False),
    ],
)
def test_who_shares_cores_is_interrupted_often(
    samples: tuple[float, ...], preemptions: int | None, shared: bool
) -> None:
    row = replace(TIMED, samples=samples, preemptions=preemptions)
    assert row.shared_cores is shared
    assert results.shared_cores([row, ABSENT]) == (int(shared), 1)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    results.write(path, RUN, [TIMED])
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        results.write(path, {**RUN, "bad": math.nan}, [TIMED])
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize("text", ["not json", "[1]", "{}", '{"format": 1}', '{"kind": "x"}'])
def test_reads_only_its_own(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match="line 1: not a line of benchmark results"):
        results.read(path)


def test_refuses_other_formats_and_headless_files(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"kind": "run", "format": 99}\n')
    with pytest.raises(ValueError, match="another format"):
        results.read(path)
    path.write_text("")
    with pytest.raises(ValueError, match="where it was measured"):
        results.read(path)


def test_a_run_says_where_and_with_what() -> None:
    facts = runner.describe_run("quick", "cpu", runner.Options(), pages_kept=False)
    assert {"commit", "modified", "csrc_sha256", "threads", "cache", "machine", "versions"} <= set(
        facts
    )
    assert facts["machine"]["cores"] >= 1
    json.dumps(facts, allow_nan=False)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be bound here")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core is one place")
def test_a_run_says_whether_its_threads_are_bound(num_threads: None) -> None:
    allowed = os.sched_getaffinity(0)
    torch.set_num_threads(2)
    assert machine.threads_bound() is False
    try:
        os.sched_setaffinity(0, {min(allowed)})
        facts = runner.describe_run("quick", "cpu", runner.Options(), pages_kept=False)
        assert facts["threads_bound"] is True
        assert facts["machine"]["cores"] == os.cpu_count()
        torch.set_num_threads(1)
        assert machine.threads_bound() is False
    finally:
        os.sched_setaffinity(0, allowed)


def test_the_hash_of_a_kernel_follows_what_it_includes(tmp_path: Path) -> None:
    texts = {
        "cuda/sm90/a.cu": '#include "kernels/a.cuh"\n#include <cuda.h>\n',
        "cuda/sm90/b.cu": '#include "attnres/params.hpp"\n',
        "cuda/kernels/a.cuh": '#pragma once\n  #  include "shape.hpp"\n',
        "cuda/kernels/shape.hpp": '#include "a.cuh"\n',
        "include/attnres/params.hpp": "",
    }
    for name, text in texts.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = sources.kernel_hashes(tmp_path)
    assert before.keys() == {"sm90/a", "sm90/b"}
    (tmp_path / "csrc/cuda/kernels/shape.hpp").write_text("changed")
    after = sources.kernel_hashes(tmp_path)
    assert after["sm90/a"] != before["sm90/a"]
    assert after["sm90/b"] == before["sm90/b"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("ops/a.cpp", "cpu/a.cpp", "cuda/sm90/a.cu", "include/attnres/plan.hpp"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def test_source_hash_follows_names_and_contents(checkout: Path) -> None:
    first = sources.hashes(checkout)
    assert machine.source_hashes(checkout) == first
    (checkout / "csrc/ops/a.cpp").write_text("two")
    second = sources.hashes(checkout)
    (checkout / "csrc/ops/a.cpp").rename(checkout / "csrc/ops/b.cpp")
    third = sources.hashes(checkout)
    for name in ("cpu", "cuda"):
        assert len({one["backend_sha256"][name] for one in (first, second, third)}) == 3
    assert len({one["csrc_sha256"] for one in (first, second, third)}) == 3


@pytest.mark.parametrize(
    ("changed", "stand"),
    [
        ("cuda/sm90/a.cu", {"cpu"}),
        ("cuda/sm90/new.cu", {"cpu"}),
        ("cpu/a.cpp", {"cuda", "cuda:1"}),
        ("ops/a.cpp", set()),
        ("include/attnres/plan.hpp", set()),
    ],
)
def test_a_result_stands_until_the_code_behind_it_changes(
    checkout: Path, changed: str, stand: set[str]
) -> None:
    devices = ("cpu", "cuda", "cuda:1")
    records = {device: {"device": device, **machine.code(checkout)} for device in devices}
    build = machine.code(checkout)
    present = sources.hashes(checkout)
    assert all(sources.is_current(one, present) for one in (build, *records.values()))
    (checkout / "csrc" / changed).write_text("changed")
    present = sources.hashes(checkout)
    assert {d for d, record in records.items() if sources.is_current(record, present)} == stand
    assert not sources.is_current(build, present)


def test_results_from_before_there_were_hashes_of_backends_stand_while_nothing_changes(
    checkout: Path,
) -> None:
    old = {"device": "cpu", "csrc_sha256": sources.source_hash(checkout)}
    assert sources.is_current(old, sources.hashes(checkout))
    (checkout / "csrc/cuda/sm90/a.cu").write_text("changed")
    assert not sources.is_current(old, sources.hashes(checkout))
    assert not sources.is_current({"device": "cpu"}, sources.hashes(checkout))


def test_where_there_are_no_sources_a_record_says_so(tmp_path: Path) -> None:
    assert machine.source_hashes() is not None
    assert sources.is_current(machine.code(), machine.source_hashes())
    unknown = {"csrc_sha256": None, "backend_sha256": {}}
    assert sources.is_current({"device": "cpu", **unknown}, sources.hashes(tmp_path)) is False


def test_a_commit_is_that_of_these_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = {"commit": None, "modified": None}
    assert machine.commit(tmp_path) == unknown
    around, inside = tmp_path / "around", tmp_path / "around" / "copy"
    inside.mkdir(parents=True)
    of_the_other = commit_in(around)
    # A copy of the files within somebody else's repository, and a hook of that one.
    assert machine.commit(inside) == unknown
    monkeypatch.setenv("GIT_DIR", str(around / ".git"))
    assert machine.commit(inside) == unknown
    own = commit_in(inside)
    assert own != of_the_other
    assert machine.commit(inside) == {"commit": own, "modified": False}
    (inside / "file").write_text("changed")
    assert machine.commit(inside)["modified"] is True


def commit_in(folder: Path) -> str:
    """The hash of a commit in a new repository."""
    (folder / "file").write_text(folder.name)
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", folder.name]):
        subprocess.run([*git, *command], check=True, env=clean)
    head = [*git, "rev-parse", "HEAD"]
    return subprocess.run(head, check=True, env=clean, capture_output=True, text=True).stdout[:40]
