"""Where and with what something was measured."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from attnres_ext import _C, sources

#: Packages on PyPI that the operators are compared with.
RIVALS = ("flash-linear-attention", "liger-kernel", "flash-attn-res", "fast-attnres")

_CPU = Path("/sys/devices/system/cpu/cpu0/cache")


@lru_cache(maxsize=1)
def repository() -> Path | None:
    """The checkout this file lies in; None in an installed package."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "csrc").is_dir() and (root / "pyproject.toml").is_file() else None


def source_hashes(root: Path | None = None) -> dict[str, Any] | None:
    """:func:`attnres_ext.sources.hashes`; None without sources."""
    root = root or repository()
    return None if root is None else sources.hashes(root)


def code(root: Path | None = None) -> dict[str, Any]:
    """Which code lies here: its commit, and the hashes of its sources (None without sources)."""
    unknown = {"csrc_sha256": None, "backend_sha256": {}}
    return {**commit(root), **(source_hashes(root) or unknown)}


def commit(root: Path | None = None) -> dict[str, Any]:
    """``{"commit": hash or None, "modified": whether tracked files differ from it}``.

    Of the files here: None where they have no repository of their own, whatever folder they lie in.
    """
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
    # Git would otherwise look in the folders above, or where a hook that runs this points to.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    environment["GIT_CEILING_DIRECTORIES"] = str(root.resolve().parent)
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=30, env=environment
    )
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


def last_cache(device: str) -> int:
    """Bytes of the cache that is nearest to memory; 64 MiB where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = caches()
    return sizes[max(sizes)] if sizes else 64 * 2**20


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, caches, memory and system, and the GPU where ``device`` is one."""
    return {
        **(_gpu(device) if device.startswith("cuda") else {}),
        "processor": _processor(),
        "cores": os.cpu_count() if threads_bound() else len(_allowed_cores()),
        "caches": caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if hasattr(os, "sysconf")
        else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def threads_bound() -> bool:
    """Whether threads stay on a core each (``OMP_PROC_BIND=true``), this one too."""
    return torch.get_num_threads() > 1 and len(_allowed_cores()) == 1


def _allowed_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def versions() -> dict[str, str]:
    """Of everything that could change a figure."""
    found = {
        "attnres_ext": _C.version,
        "compiler": _C.compiler,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for name in ("triton", *RIVALS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _gpu(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute_capability": 10 * properties.major + properties.minor,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_l2_bytes": properties.L2_cache_size,
        "gpu_multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.split() or [None])[0]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
