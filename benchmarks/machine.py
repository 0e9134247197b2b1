"""Where and with what something was measured."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attnres_ext import _C

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")


@lru_cache(maxsize=1)
def repository() -> Path | None:
    """The checkout this file lies in; None in an installed package."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "csrc").is_dir() and (root / "pyproject.toml").is_file() else None


def source_hash(root: Path | None = None) -> str | None:
    """SHA-256 over names and contents of everything under ``csrc/``; None without sources."""
    root = root or repository()
    if root is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.is_file()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit(root: Path | None = None) -> dict[str, Any]:
    """``{"commit": hash or None, "modified": whether tracked files differ from it}``."""
    root = root or repository()
    unknown = {"commit": None, "modified": None}
    if root is None:
        return unknown
    try:
        head = _git(root, "rev-parse", "HEAD")
        return {"commit": head, "modified": bool(_git(root, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return unknown


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    return done.stdout.strip()


def caches() -> dict[str, int]:
    """Bytes of the caches that core 0 sees, for example ``{"L1d": 49152, "L2": 2097152}``."""
    sizes: dict[str, int] = {}
    for index in sorted(_CPU.glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind == "Instruction":
            continue
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1:], 1)
        suffix = "d" if kind == "Data" else ""
        sizes[f"L{level}{suffix}"] = int(size.rstrip("KMG")) * unit
    return sizes


def describe() -> dict[str, Any]:
    """Processor, caches, memory and system."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "caches": caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if hasattr(os, "sysconf")
        else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Of everything that could change a figure."""
    return {
        "attnres_ext": _C.version,
        "compiler": _C.compiler,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
