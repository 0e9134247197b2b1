"""Figures in words, the same in the documentation and in the report.

Needs nothing that is compiled and nothing of this package: ``tools/figures.py`` loads it by file.
"""

from __future__ import annotations

from typing import Any

#: What people call a baseline.
BASELINES = {
    "ours": "attnres-ext",
    "eager": "plain PyTorch",
    "compile": "torch.compile",
    "compile-max": "torch.compile, max-autotune",
    "standard": "standard residual",
    "standard-fused": "standard residual, fused",
    "copy": "copy",
    "fla": "flash-linear-attention",
    "fla-keep": "flash-linear-attention, level 0",
    "fla-gluon": "flash-linear-attention, Gluon",
    "liger": "Liger",
    "flash-attn-res": "flash-attn-res",
    "fast-attnres": "fast-attnres",
}


def baseline(name: str) -> str:
    """What people call ``name``; itself where nobody gave it another name."""
    return BASELINES.get(name, name)


def digits(value: float, count: int = 3) -> str:
    """``value`` with ``count`` significant digits and without an exponent."""
    text = f"{value:#.{count}g}".removesuffix(".")
    return f"{float(text):,.0f}" if "e" in text else text


def seconds(value: float) -> str:
    """A time with three digits, in the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{digits(value * factor)} {unit}"
    raise AssertionError


def duration(value: float) -> str:
    """A time that people wait for: seconds, or minutes and seconds."""
    if value < 99.5:
        return f"{digits(value)} s"
    return f"{round(value) // 60} min {round(value) % 60} s"


def percent(share: float, places: int = 1) -> str:
    """A change with its sign."""
    text = f"{100 * share:+.{places}f} %"
    unsigned = text[1:] if not text.strip("+-0. %") else text
    return unsigned.replace("-", "−")


def size(num_bytes: float) -> str:
    """Bytes with three digits, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{digits(num_bytes / factor)} {unit}"
    return f"{num_bytes:.0f} B"


def version(run: dict[str, Any]) -> str:
    """What was measured."""
    if not run.get("commit"):
        return "outside of a checkout"
    return f"commit {run['commit'][:10]}{', with changes' if run.get('modified') else ''}"


def shared_cores(shared: int, timed: int) -> str:
    """That other processes ran beside ``shared`` of ``timed`` measurements."""
    return f"{shared} of {timed} measurements shared their cores with other processes"


def processor(run: dict[str, Any]) -> str:
    """What did the work: the GPU if there was one, else the CPU."""
    machine = run.get("machine", {})
    if str(run.get("device", "")).startswith("cuda") and machine.get("gpu"):
        return machine["gpu"]
    return machine.get("processor") or "unknown processor"


def memory(run: dict[str, Any]) -> str:
    """What became of freed memory, which decides on many a figure of a CPU; "" elsewhere."""
    if not str(run.get("device", "")).startswith("cpu") or "pages_kept" not in run:
        return ""
    return {
        True: "freed memory kept",
        False: "freed memory given back",
        None: "freed memory as the environment says",
    }[run["pages_kept"]]


def command(run: dict[str, Any]) -> str:
    """The command that makes such a run."""
    if run.get("command"):
        return run["command"]
    words = ["attnres bench", f"--device {run['device']}", f"--suite {run['suite']}"]
    if run.get("cache") == "cold":
        words.append("--cold")
    if run.get("pages_kept") is False and not str(run["device"]).startswith("cuda"):
        words.append("--allocator system")
    return " ".join([*words, "--out benchmarks/results"])
