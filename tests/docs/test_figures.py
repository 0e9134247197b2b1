"""The tables of figures: rendered from results, and up to date."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tool import load_tool

ROOT = Path(__file__).resolve().parents[2]


tool = load_tool("figures")
QUICK = tool.registry.select("quick", device="cpu")
DATES = ("2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00")


@pytest.mark.parametrize("name", tool.DOCUMENTS)
def test_documents_show_what_was_measured(name: str) -> None:
    text = (ROOT / name).read_text()
    assert tool.TABLE.search(text), f"{name} has no table"
    assert tool.render(text) == text, "out of date: run `python tools/figures.py`"


def keep(
    folder: Path,
    date: str,
    suite: str,
    device: str = "cpu",
    cases: int = 1,
    pages_kept: bool = True,
    **extra: object,
) -> None:
    """A run of a few cases in which we take 2 ms, a copy 1 ms and plain PyTorch 7 ms."""
    times = {"ours": 2e-3, "copy": 1e-3, "eager": 7e-3, "compile": None}
    rows = [
        tool.results.Result(
            case.name,
            case.operator,
            case.shape,
            case.work,
            case.origin,
            contestant,
            status="absent" if seconds is None else "timed",
            seconds=seconds,
            bytes=4_000_000,
        )
        for case in QUICK[:cases]
        for contestant, seconds in times.items()
    ]
    run = {
        "date": date,
        "suite": suite,
        "device": device,
        "threads": 2,
        "pages_kept": pages_kept,
        "commit": "0123456789abcdef",
        "modified": False,
        "machine": {"processor": "A Processor", **extra},
        "versions": {"torch": "2.13.0"},
    }
    tool.results.write(folder / f"{device}-{suite}-{date}.jsonl", run, rows)


def test_a_table_shows_times_and_ratios(tmp_path: Path) -> None:
    keep(tmp_path, DATES[0], "quick")
    text = "before\n<!-- figures: operators cpu quick -->\nold\n<!-- /figures -->\nafter\n"
    table = tool.render(text, tmp_path)
    assert f"| `{QUICK[0].operator}` | {QUICK[0].shape} | {QUICK[0].work} |" in table
    assert "| 2.00 ms | 2.0 | 50 % | 3.5 × | – |" in table
    assert "old" not in table
    assert table.startswith("before\n")
    assert table.endswith("after\n")
    assert "A Processor" in table
    assert "commit 0123456789;" in table
    # Rendering what is rendered changes nothing.
    assert tool.render(table, tmp_path) == table


def test_a_table_says_that_the_machine_was_shared(tmp_path: Path) -> None:
    keep(tmp_path, DATES[0], "quick")
    assert "shared" not in tool.operators("cpu", "quick", tmp_path)[-1]
    (path,) = tmp_path.iterdir()
    run, rows = tool.results.read(path)
    busy = [dataclasses.replace(row, preemptions=4 * (row.contestant == "ours")) for row in rows]
    tool.results.write(path, run, busy)
    last = tool.operators("cpu", "quick", tmp_path)[-1]
    assert last.endswith("In this run 1 of 3 measurements shared their cores with other processes.")


def test_the_run_with_most_cases_is_shown_and_then_the_newest(tmp_path: Path) -> None:
    keep(tmp_path, DATES[1], "quick")
    keep(tmp_path, DATES[0], "ops")
    run, _, cases = tool.best_run(tmp_path, "cpu", "quick")
    assert (run["suite"], run["date"]) == ("quick", DATES[1])
    assert list(cases) == [QUICK[0].name]
    keep(tmp_path, DATES[0], "quick", cases=2)
    run, rows, _ = tool.best_run(tmp_path, "cpu", "quick")
    assert (run["suite"], run["date"]) == ("quick", DATES[0])
    assert {row.case for row in rows} == {case.name for case in QUICK[:2]}
    assert tool.best_run(tmp_path, "cuda", "quick") is None


def test_figures_with_memory_kept_and_given_back_are_two_tables(tmp_path: Path) -> None:
    assert "--allocator system" in tool.plain("cpu", "quick", tmp_path)[0]
    for date, kept in zip(DATES, (True, False), strict=True):
        keep(tmp_path, date, "quick", pages_kept=kept)
    for table, date, words in (
        (tool.operators, DATES[0], "freed memory kept."),
        (tool.plain, DATES[1], "freed memory given back."),
    ):
        last = table("cpu", "quick", tmp_path)[-1]
        assert date[:10] in last
        assert last.endswith(words)


def test_a_table_of_a_gpu_shows_who_failed_and_who_is_faster(tmp_path: Path) -> None:
    first, second = tool.registry.select("quick", device="cuda")[:2]
    rows = [result(first, "ours", 4e-4), result(first, "copy", 3e-4), result(first, "fla", 2e-4)]
    lost = {"status": "failed", "seconds": None, "bytes": None, "reason": "an operator: no image"}
    rows.append(dataclasses.replace(result(second, "ours", 1.0), **lost))
    run = {"date": DATES[0], "suite": "quick", "device": "cuda", "note": "By hand.",
           "commit": None, "machine": {"gpu": "X"}, "versions": {"torch": "2.13"}}  # fmt: skip
    tool.results.write(tmp_path / "cuda-quick.jsonl", run, rows)
    table = "\n".join(tool.operators("cuda", "quick", tmp_path))
    assert "| 400 µs | 20.0 | 75 % | 0.50 × | – |" in table
    assert f"{second.work} | failed | – | – | – | – |" in table
    failed = f"Failed: `{second.operator}` {second.shape} {second.work}: no image."
    assert table.endswith(f"X, torch 2.13. By hand. {failed}")


def test_without_results_the_table_says_how_to_get_them(tmp_path: Path) -> None:
    text = "<!-- figures: operators cpu quick -->\n<!-- /figures -->\n"
    assert "attnres bench --device cpu --suite quick" in tool.render(text, tmp_path)


def test_training_shows_the_newest_run(tmp_path: Path) -> None:
    overhead = {"percent": 3.25, "low": 2.0, "high": 4.5}
    arms = [
        {
            "arm": arm,
            "parameters": 1_234_567,
            "val_loss": 1.5,
            "bits_per_byte": 2.164,
            "ms_per_step": 800.4,
            "overhead": overhead if arm == "block" else None,
        }
        for arm in ("standard", "block")
    ]
    for date in DATES:
        record = {
            "date": date,
            "command": "attnres train --preset demo",
            "steps": 160,
            "tokens_per_step": 1024,
            "text": "the text",
            "commit": "0123456789abcdef",
            "machine": {"processor": "A Processor"},
            "versions": {"torch": "2.13.0"},
            "arms": arms,
        }
        (tmp_path / f"training-{date}.json").write_text(json.dumps(record))
    table = "\n".join(tool.training(tmp_path))
    assert "| standard | 1,234,567 | 1.500 | 2.164 | 800 | – |" in table
    assert "| +3.2 % (+2.0 to +4.5) |" in table
    assert DATES[1][:10] in table


def keep_check(
    folder: Path,
    date: str,
    capability: int = 90,
    outcome: str = "passed",
    parts: dict[str, Any] | None = None,
    library_sets: list[str] | None = None,
    **changes: str,
) -> None:
    """A record of ``make gpu-check`` for the kernels as they are, with ``changes`` to them."""
    record = {
        "kind": "gpu-check",
        "date": date,
        "device": "cuda",
        "commit": "0123456789abcdef",
        "modified": False,
        "machine": {"gpu": "NVIDIA X", "compute_capability": capability},
        **({} if library_sets is None else {"library_sets": library_sets}),
        "kernels": {**tool.sources().kernel_hashes(ROOT), **changes},
        "parts": {
            "tests": {"tests": {"tests/ops/test_depth_attention.py::test_a[cuda]": outcome}},
            "bench": {
                "figures": {
                    "run": {"kind": "run", "format": 1, "date": date, "device": "cuda"},
                    "results": [],
                }
            },
            **(parts or {}),
        },
    }
    (folder / f"gpu-check-nvidia-x-{date}.json").write_text(json.dumps(record))


def verified(folder: Path) -> dict[str, str]:
    """Last column of the forward kernels of depth attention, by set."""
    lines = [line for line in tool.verification(folder) if "`depth_attention` forward" in line]
    return {line.split("|")[2].strip(): line.split("|")[-2].strip() for line in lines}


def test_verification_needs_a_check_on_that_kind_of_gpu(tmp_path: Path) -> None:
    assert set(verified(tmp_path).values()) == {"never"}
    # A benchmark's gate is no test.
    keep(tmp_path, DATES[0], "quick", device="cuda", compute_capability=90)
    assert set(verified(tmp_path).values()) == {"never"}
    keep_check(tmp_path, DATES[0])
    assert verified(tmp_path) == {
        "sm90": "passed, 2026-01-01, commit 0123456789, NVIDIA X",
        "sm80": "never",
    }


def test_verification_ends_where_the_code_changes(tmp_path: Path) -> None:
    keep_check(tmp_path, DATES[0], **{"sm90/depth_attention": "before"})
    assert verified(tmp_path)["sm90"].startswith("unverified: changed since 2026-01-01")
    keep_check(tmp_path, DATES[1], **{"sm90/another": "before"})
    assert verified(tmp_path)["sm90"].startswith("passed, 2026-02-01")


def test_verification_shows_failures(tmp_path: Path) -> None:
    keep_check(tmp_path, DATES[0])
    keep_check(tmp_path, DATES[1], outcome="failed")
    assert verified(tmp_path)["sm90"].startswith("failed, 2026-02-01")
    # Skipped is neither.
    keep_check(tmp_path, DATES[1], outcome="skipped")
    assert verified(tmp_path)["sm90"].startswith("passed, 2026-01-01")


@pytest.mark.parametrize(
    "test",
    [
        "test_merge_partial.py::test_a[cuda]",
        "test_block_cache.py::test_a[cuda]",
        "test_every_kernel.py::test_depth_attention_with_merge[cuda]",
    ],
)
def test_verification_shows_failures_of_whoever_runs_the_kernel(tmp_path: Path, test: str) -> None:
    tests = {"tests/ops/test_depth_attention.py::test_a[cuda]": "passed"}
    failing = {"kernels": {"tests": {f"tests/ops/{test}": "failed"}}, "tests": {"tests": tests}}
    keep_check(tmp_path, DATES[0], parts=failing)
    ways = " in 1 of 1 ways of launching it" if "every_kernel" in test else ""
    assert verified(tmp_path)["sm90"].startswith(f"failed{ways}, 2026-01-01")


def test_verification_tells_forward_from_backward_and_what_ships_from_what_does_not(
    tmp_path: Path,
) -> None:
    way = "tests/ops/test_every_kernel.py::test_depth_attention[cuda-ring-"
    for date, sets, backward in ((DATES[0], ["80", "90"], "failed"), (DATES[1], ["90"], "passed")):
        outcomes = {f"{way}forward]": "passed", f"{way}backward]": backward}
        parts = {"kernels": {"tests": outcomes}, "tests": {}}
        keep_check(tmp_path, date, parts=parts, library_sets=sets)
    where = "commit 0123456789, NVIDIA X"
    alone = f"; in a library of sm90 alone, passed, 2026-02-01, {where}"
    assert verified(tmp_path)["sm90"] == f"passed, 2026-01-01, {where}{alone}"
    (line,) = [
        one for one in tool.verification(tmp_path) if "`depth_attention` backward | sm90" in one
    ]
    assert f"| failed in 1 of 1 ways of launching it, 2026-01-01, {where}{alone} |" in line


def test_checks_are_listed_part_by_part(tmp_path: Path) -> None:
    assert "`make gpu-check` does it" in tool.checks(tmp_path)[0]
    part = {"status": "failed", "counts": {"passed": 1200, "failed": 3}, "collected": 1210}
    parts = {"kernels": part, "tests": {"status": "unavailable"}, "bench": {"status": "passed"}}
    keep_check(tmp_path, DATES[0], parts=parts, library_sets=["80", "90"])
    assert tool.checks(tmp_path)[2:] == [
        f"| 2026-01-01 00:00 | NVIDIA X | commit 0123456789 | sm80, sm90 | {row} |"
        for row in (
            "tests | unavailable | ",
            "bench | passed | ",
            "kernels | failed | 1,200 of 1,210 passed, 3 failed",
        )
    ]


def test_verification_shows_what_was_not_reached(tmp_path: Path) -> None:
    tests = {"tests/ops/test_depth_attention.py::test_a[cuda]": "passed"}
    keep_check(tmp_path, DATES[0], parts={"tests": {"tests": tests, "collected": 1}})
    assert verified(tmp_path)["sm90"].startswith("passed, 2026-01-01")
    keep_check(tmp_path, DATES[1], parts={"tests": {"tests": tests, "collected": 2}})
    assert verified(tmp_path)["sm90"].startswith("passed in part, 2026-02-01")


def test_verification_shows_what_checkers_found(tmp_path: Path) -> None:
    keep_check(tmp_path, DATES[0], parts={"memcheck": {"errors": 0}, "racecheck": {"errors": 2}})
    assert verified(tmp_path)["sm90"].startswith("passed, but racecheck found errors, 2026-01-01")


def test_figures_of_a_check_count_as_a_run(tmp_path: Path) -> None:
    keep_check(tmp_path, DATES[0])
    ((run, rows),) = tool.runs(tmp_path)
    assert (run["device"], rows) == ("cuda", [])


def result(case: object, contestant: str, seconds: float) -> object:
    return tool.results.Result(
        case.name, case.operator, case.shape, case.work, case.origin, contestant, status="timed",
        seconds=seconds, bytes=8_000_000,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "wide", "limit"),
    [
        (10e-3, 20e-3, "memory"),
        (18e-3, 30e-3, "memory and arithmetic"),
        # As long as float32 takes for twice the bytes.
        (18e-3, 20e-3, "arithmetic"),
        (30e-3, 60e-3, "arithmetic"),
    ],
)
def test_what_limits_an_operator_follows_from_its_times(
    ours: float, wide: float, limit: str
) -> None:
    by_shape = {case.shape: case for case in QUICK if case.work == "forward"}
    narrow, full = (by_shape[f"N9 M2048 D2304 {dtype}"] for dtype in ("bf16", "fp32"))
    rows = [result(narrow, "copy", 9e-3), result(narrow, "ours", ours), result(full, "ours", wide)]
    _, (cells,), _ = tool.tables.limits(tool.tables.by_case(rows))
    assert cells[3:] == [
        "8.00 MB", f"{1e3 * ours:.1f} ms", f"{0.9 / ours:.0f} %",
        f"{100 * ours / wide:.0f} %", limit,
    ]  # fmt: skip


def test_a_call_that_costs_as_much_as_the_work_is_the_limit() -> None:
    case, host = QUICK[0], next(case for case in QUICK if case.is_host)
    rows = [result(case, "copy", 1e-6), result(case, "ours", 30e-6), result(host, "ours", 12e-6)]
    cases = tool.tables.by_case(rows)
    assert [cells[-1] for cells in tool.tables.limits(cases).rows] == ["the call"]
    _, (cells,), _ = tool.tables.host(cases.values())
    assert cells[3:5] == ["12.0 µs", "83,333"]


def test_models_show_the_newest_run_of_every_case(tmp_path: Path) -> None:
    assert "--suite model" in tool.models("cpu", tmp_path)[0]
    for date, seconds, cases in ((DATES[0], 1.0, ("a", "b")), (DATES[1], 2.0, ("a",))):
        rows = [
            tool.results.ModelResult(
                case=case, work="train", residual="block", contestant="ours", shape=f"stack {case}",
                layers=2, hidden=8, sublayers_per_block=2, blocks=3, batch=1, tokens=4, context=0,
                dtype="float32", scaling=(), origin="scaled", status="timed", seconds=seconds,
                tokens_per_second=4 / seconds, peak_bytes=2_000_000,
                overhead=0.02, overhead_quartiles=(-0.01, 0.03),
            )
            for case in cases
        ]  # fmt: skip
        run = {
            "date": date, "suite": "model", "device": "cpu", "threads": 2, "commit": None,
            "machine": {"processor": "A Processor"}, "versions": {"torch": "2.13.0"},
        }  # fmt: skip
        tool.results.write(tmp_path / f"cpu-model-{date}.jsonl", run, rows)
    table = "\n".join(tool.models("cpu", tmp_path))
    over = "+2.0 % (−1.0 % to +3.0 %)"
    assert f"| train | stack a | block | attnres-ext | 2.00 s | 2 | 2.00 MB | {over} |" in table
    assert f"| train | stack b | block | attnres-ext | 1.00 s | 4 | 2.00 MB | {over} |" in table
    assert DATES[0][:10] in table
    assert DATES[1][:10] in table


def test_builds_show_the_longest_steps_and_the_rest_together(tmp_path: Path) -> None:
    assert "tools/time_build.py" in tool.build(tmp_path)[0]
    record = {
        "date": DATES[0],
        "command": "python tools/time_build.py --jobs 2",
        "commit": "0123456789abcdef",
        "machine": {"processor": "A Processor"},
        "versions": {"torch": "2.13.0"},
        "seconds": 130.0,
        "processor_seconds": 240.0,
        "steps": [{"target": f"step {i}", "seconds": 10.0 - i} for i in range(8)],
        "libraries": [
            {
                "name": "_ops.so",
                "bytes": 6_000_000,
                "device_code": [{"arch": "sm_90", "kind": "machine code", "bytes": 700_000}],
            }
        ],
    }
    (tmp_path / "build-1.json").write_text(json.dumps(record))
    table = "\n".join(tool.build(tmp_path))
    assert "| `step 5` | 5.00 s | – |" in table
    assert "| 2 more together | 7.00 s | – |" in table
    assert "| **all of it** | **2 min 10 s** | – |" in table
    assert "| processor time | 4 min 0 s | – |" in table
    assert "| of it sm_90, machine code | – | 700 kB |" in table
    assert "`python tools/time_build.py --jobs 2`, 2026-01-01" in table


def test_the_papers_table_comes_out_of_its_formulas() -> None:
    header, rows, _ = tool.derived.table1()
    assert header[2:] == [
        "Table 1: L128 N8 S16", "Kimi Linear 48B: L54 N9 S6", "Kimi K3: L186 N8 S24",
    ]  # fmt: skip
    by_name = {tuple(cells[:2]): cells[2:] for cells in rows}
    assert by_name["full, two phases", "paper"][0] == "24"
    assert by_name["block, two phases", "paper"] == ["5.50", "6.50", "5.33"]
    # S sites of a block with n sources: S(n + 4) - 2 in a single pass, n + 6S - 2 in two phases.
    blocks, sites = 8, 16
    single = sum(sites * (n + 4) - 2 for n in range(1, blocks + 1)) / (blocks * sites)
    double = sum(n + 6 * sites - 2 for n in range(1, blocks + 1)) / (blocks * sites)
    assert by_name["block, single pass", "ours, all of it"][0] == f"{single:.2f}"
    assert by_name["block, two phases", "ours, all of it"][0] == f"{double:.2f}"
    assert by_name["block, two phases", "ours, as the paper counts"][0] == f"{double - 1:.2f}"
    # The plan never chooses more bytes than either.
    chosen = by_name["block, as the plan chooses", "ours, all of it"]
    assert all(float(value) <= double for value in chosen[:1])


def test_kimi_k3s_last_block_is_shorter() -> None:
    blocks = list(tool.derived.K3.sites())
    assert blocks[0] == (1, 24)
    assert blocks[-1] == (8, 18)
    assert sum(sites for _, sites in blocks) == 186


def test_the_check_is_quick_and_needs_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['figures.py', '--check']; sys.path.insert(0, 'tools')\n"
        "import figures; code = figures.main()\n"
        "sys.exit(code or ('torch' in sys.modules and 'torch was imported') or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_evidence_shows_every_mode_at_its_best_rate(tmp_path: Path) -> None:
    assert tool.evidence("small", tmp_path) == [
        "Nothing is kept yet; the command above measures it."
    ]
    losses = {"standard": (3.0, 2.0), "block": (1.5, 2.5)}
    record = {
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python -m attnres_ext.benchmarks.evidence --design small --out DIR",
        "text": "a text",
        "commit": "0123456789abcdef",
        "modified": False,
        "design": {
            "residuals": list(losses), "learning_rates": [0.1, 0.2], "seeds": [0, 1],
            "steps": 7, "batch_size": 2, "sequence_length": 16,
        },
        "losses": [
            {"residual": mode, "learning_rate": rate, "seed": seed, "val_loss": loss + seed / 10}
            for mode, by_rate in losses.items()
            for rate, loss in zip((0.1, 0.2), by_rate, strict=True)
            for seed in (0, 1)
        ],
    }  # fmt: skip
    (tmp_path / "evidence-small.json").write_text(json.dumps(record))
    table = tool.evidence("small", tmp_path)
    assert table[0] == (
        "| residual | best rate | validation loss | minus standard | at 0.1 | at 0.2 |"
    )
    assert table[2].startswith("| standard | 0.2* | 2.050 ± 0.071 | – | 3.050 ± 0.071 |")
    assert table[3].startswith("| block | 0.1* | 1.550 ± 0.071 | -0.500 ± 0.000 |")
    assert "7 steps of 32 tokens, 2 seeds" in table[-1]
    assert "commit 0123456789" in table[-1]
