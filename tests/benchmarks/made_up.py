"""A folder of made-up results in which everything occurs that a report has to show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnres_ext.benchmarks import results
from attnres_ext.benchmarks.registry import Case
from attnres_ext.benchmarks.results import ModelResult, Result

PRESENT, OLD = "a" * 64, "b" * 64
#: What lies here now.
HASHES = {"csrc_sha256": PRESENT, "backend_sha256": {"cpu": "c" * 64, "cuda": "d" * 64}}
#: Shares of the median, so that the quartiles lie 4 % around it.
SAMPLES = (0.94, 0.96, 1.0, 1.04, 1.06)

MIX = Case("depth_attention", 9, 2048, 2304)
ADD = Case("accumulate_depth_attention", 8, 2048, 2304, norm=True)
HOST = Case("depth_attention", 8, 1, 64, "float32", origin="host")


def facts(date: str, device: str = "cpu", csrc: str = PRESENT, **others: Any) -> dict[str, Any]:
    """The first line of a run."""
    machine: dict[str, Any] = {"processor": "A <Processor> & Co", "cores": 2}
    if device == "cuda":
        machine |= {"gpu": "A GPU", "compute_capability": 90, "driver": "999.1"}
    return {
        "date": f"{date}T00:00:00+00:00",
        "suite": "all",
        "device": device,
        "threads": 2,
        "cache": "warm",
        "pages_kept": True,
        "commit": csrc[:1] * 40,
        "modified": False,
        "csrc_sha256": csrc,
        "machine": machine,
        "versions": {"torch": "2.13.0", "compiler": "gcc 12"},
        **others,
    }


def timed(case: Case, contestant: str, seconds: float, **others: Any) -> Result:
    """Somebody who took ``seconds``."""
    made = Result(
        case.name,
        case.operator,
        case.shape,
        case.work,
        case.origin,
        contestant,
        status="timed",
        seconds=seconds,
        best_seconds=SAMPLES[0] * seconds,
        spread=SAMPLES[3] - SAMPLES[1],
        samples=tuple(share * seconds for share in SAMPLES),
        preemptions=0,
        bytes=None if case.is_host else 1_000_000,
        error=0.25,
    )
    return replace(made, **others)


def refused(case: Case, contestant: str, status: str, reason: str) -> Result:
    """Somebody who was not timed."""
    return Result(
        case.name, case.operator, case.shape, case.work, case.origin, contestant, status=status,
        reason=reason,
    )  # fmt: skip


def model(
    layers: int, residual: str, contestant: str, seconds: float, **others: Any
) -> ModelResult:
    """A training step of a stack whose standard residual takes a second."""
    over = seconds - 1
    made = ModelResult(
        case=f"train/L{layers}-D256",
        work="train",
        residual=residual,
        contestant=contestant,
        shape=f"{layers} layers, D256",
        layers=layers,
        hidden=256,
        sublayers_per_block=4,
        blocks=layers // 2 + 1,
        batch=1,
        tokens=512,
        context=0,
        dtype="float32",
        scaling=("layers",),
        origin="scaled",
        status="timed",
        seconds=seconds,
        best_seconds=SAMPLES[0] * seconds,
        spread=0.08,
        samples=tuple(share * seconds for share in SAMPLES),
        preemptions=0,
        tokens_per_second=512 / seconds,
        peak_bytes=123_456_789,
        overhead=over,
        overhead_quartiles=(0.8 * over, 1.2 * over),
        error=0.5,
    )
    return replace(made, **others)


def operators(scale: float = 1.0) -> list[Result]:
    """Rows of three cases; ours take ``scale`` times as long as usual."""
    return [
        timed(MIX, "copy", 4e-3),
        timed(MIX, "ours", 5e-3 * scale),
        timed(MIX, "eager", 50e-3),
        timed(MIX, "compile", 4e-3),
        refused(MIX, "fla", "absent", "fla is not installed & <never> was"),
        refused(MIX, "liger", "wrong", "gradient of the query is off"),
        refused(MIX, "standard", "unsupported", "a standard model has no such operation"),
        timed(ADD, "copy", 6e-3),
        timed(ADD, "ours", 8e-3),
        timed(ADD, "eager", 90e-3),
        timed(ADD, "standard", 5e-3),
        timed(ADD, "standard-fused", 4e-3),
        timed(HOST, "ours", 12e-6),
        timed(HOST, "eager", 100e-6),
        refused(HOST, "fast-attnres", "failed", "RuntimeError: no device"),
    ]


def models() -> list[ModelResult]:
    """A curve over three depths, and somebody who is not there."""
    rows = []
    for layers in (4, 8, 16):
        rows += [
            model(layers, "standard", "standard", 1.0, overhead=0.0, overhead_quartiles=(0.0, 0.0)),
            model(layers, "block", "ours", 1.02 + layers / 1000),
            model(layers, "full", "ours", 1.05 + layers / 200),
            model(layers, "block", "eager", 1.3 + layers / 100),
        ]
    nothing = (
        "seconds", "best_seconds", "spread", "tokens_per_second", "peak_bytes", "overhead",
        "overhead_quartiles", "error", "preemptions",
    )  # fmt: skip
    absent = replace(model(4, "block", "fla", 1.0), **dict.fromkeys(nothing))
    rows.append(replace(absent, status="absent", reason="no GPU", samples=()))
    rows.append(
        model(8, "block", "ours", 0.25, case="decode/L8", work="decode", tokens=1, scaling=())
    )
    return rows


def build(date: str, seconds: float, size: int = 6_000_000) -> dict[str, Any]:
    """A build of two sets."""
    steps = [("csrc/cuda/sm90/depth_attention.cu", seconds * 0.9, 5_000_000)]
    steps += [(f"csrc/ops/file_{i}.cpp", 0.5, 10_000) for i in range(3)]
    return {
        "command": "python tools/time_build.py --jobs 2",
        **facts(date),
        "seconds": seconds,
        "processor_seconds": 2 * seconds,
        "jobs": 2,
        "cuda_archs": ["80", "90"],
        "steps": [
            {"output": name, "target": name, "seconds": took, "bytes": size}
            for name, took, size in steps
        ],
        "libraries": [
            {"name": "_C.so", "bytes": 200_000, "device_code": []},
            {
                "name": "_ops.so",
                "bytes": size,
                "device_code": [
                    {"arch": "sm_80", "kind": "machine code", "bytes": 700_000},
                    {"arch": "compute_90", "kind": "PTX", "bytes": 400_000},
                ],
            },
        ],
    }


def folder(at: Path) -> Path:
    """Everything: three runs on a CPU, the last one slower, one on a GPU of older code."""
    keep(at, facts("2026-01-01"), operators())
    keep(at, facts("2026-02-01"), operators(0.8))
    ladder = {"copy_gbps_by_mib": {"1": 80.0, "64": 20.5, "8": 30.0}}
    keep(at, facts("2026-03-01", **ladder), [*operators(1.2), *models()])
    keep(at, facts("2026-01-15", device="cuda", csrc=OLD), [timed(MIX, "ours", 4e-4)])
    for date, seconds in (("2026-01-02", 300.0), ("2026-03-02", 200.0)):
        (at / f"build-{date}.json").write_text(json.dumps(build(date, seconds)))
    return at


def keep(at: Path, run: dict[str, Any], rows: Sequence[Result | ModelResult]) -> Path:
    """Writes a run."""
    path = at / f"{run['device']}-{run['suite']}-{run['date'][:10]}.jsonl"
    results.write(path, run, rows)
    return path
