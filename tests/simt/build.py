"""Builds the runner with the host compiler, and the PTX of the kernels with nvcc."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = [ROOT / "csrc" / "include", ROOT / "csrc" / "cuda"]
INCLUDES = [HERE / "include", HERE, *CSRC]
HEADERS = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h")
BUILD = ROOT / "build" / "simt"

#: How kernels are run: their source, compiled for the CPU; that, under sanitizers; and the PTX that
#: nvcc makes of them.
FLAVOURS = ["plain", "sanitized", "ptx"]
#: Flags of the two builds. Optimised, the sanitized one takes a minute to compile. One operation is
#: one rounding, as PTX says: none are contracted.
FLAGS = {
    "plain": ["-O1", "-ffp-contract=off"],
    "sanitized": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
#: Kernel sets, as numbers of architectures.
SETS = ("80", "90")
#: One program runs all sets: names say that, and not which one.
SET = "simulated"


@dataclass(frozen=True)
class Runner:
    """An executable that runs cases, and the PTX that it runs, if any."""

    executable: Path
    ptx: tuple[Path, ...] = ()

    def __call__(self, cases: Path, results: Path) -> str:
        """Runs a file of cases; returns what was printed, or fails with it."""
        command = [str(path) for path in (self.executable, cases, results, *self.ptx)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def cuda_include_dir() -> Path | None:
    """The folder of the CUDA headers: of a toolkit, or of the wheels that PyTorch brings."""
    candidates = [
        Path(root) for name in ("CUDA_HOME", "CUDA_PATH") if (root := os.environ.get(name))
    ]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parents[1])
    candidates.append(Path("/usr/local/cuda"))
    nvidia = importlib.util.find_spec("nvidia")
    for base in (nvidia.submodule_search_locations or []) if nvidia else []:
        candidates += [*sorted(Path(base).glob("cu[0-9]*")), Path(base) / "cuda_runtime"]
    for candidate in candidates:
        include = candidate / "include"
        if all((include / header).exists() for header in HEADERS):
            return include
    return None


def compiler() -> str | None:
    """The host's C++ compiler."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def nvcc() -> str | None:
    """The CUDA compiler."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [
        f"{root}/bin/nvcc"
        for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
        if root
    ]
    return next((path for path in candidates if path and Path(path).exists()), None)


def missing(flavour: str) -> str | None:
    """What this machine lacks to build a flavour."""
    if cuda_include_dir() is None:
        return "no CUDA headers on this machine"
    if compiler() is None:
        return "no C++ compiler on this machine"
    if flavour == "ptx" and nvcc() is None:
        return "no nvcc on this machine"
    return None


def build_runner(flavour: str) -> Runner:
    """Builds what a flavour needs and what is not there already."""
    if flavour != "ptx":
        return Runner(build_executable(flavour))
    sources = [path for name in SETS for path in sorted((CSRC[1] / f"sm{name}").glob("*.cu"))]
    # The largest first. Two at a time: each takes one processor for up to a minute.
    with ThreadPoolExecutor(2) as pool:
        ptx = tuple(pool.map(build_ptx, reversed(sources)))
    return Runner(build_executable("plain"), ptx)


def runner_or_skip(flavour: str) -> Runner:
    """A flavour's runner, where this machine can build it."""
    reason = missing(flavour)
    if reason is not None:
        pytest.skip(reason)
    return build_runner(flavour)


def build_executable(flavour: str) -> Path:
    """The runner, of the flavour "plain" or "sanitized"."""
    command = [str(compiler()), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # Kernels are found by their names.
    command += [*FLAGS[flavour], "-rdynamic", f"-DATTNRES_CUDA_SET={SET}"]
    command += [f"-I{path}" for path in INCLUDES] + ["-isystem", str(cuda_include_dir())]
    command += [str(path) for path in sorted(HERE.rglob("*.cpp"))]
    return build(f"runner-{flavour}", command, sources_in(INCLUDES))


def build_ptx(source: Path) -> Path:
    """The PTX of an architecture's kernels of one operator."""
    name = source.parent.name.removeprefix("sm")
    command = [str(nvcc()), "-std=c++20", "-ptx", f"-arch=compute_{name}", f"-Dsm{name}={SET}"]
    command += [f"-I{path}" for path in CSRC] + [str(source)]
    return build(f"{source.stem}-{name}", command, sources_in(CSRC))


def sources_in(folders: Iterable[Path]) -> list[Path]:
    """Every file that a compiler may read there."""
    suffixes = {".cpp", ".hpp", ".cu", ".cuh"}
    return sorted({p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes})


def build(name: str, command: Sequence[str], sources: Iterable[Path]) -> Path:
    """What the command writes to ``-o``, unless sources and command are as they were."""
    digest = hashlib.sha256(repr(command).encode())
    for source in sources:
        digest.update(source.read_bytes())
    output = BUILD / f"{name}-{digest.hexdigest()[:16]}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with locked(BUILD / f".{name}.lock"):
        if not output.exists():
            for old in BUILD.glob(f"{name}-*"):
                old.unlink()
            unfinished = BUILD / f".{output.name}.unfinished"
            done = subprocess.run(
                [*command, "-o", str(unfinished)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            os.replace(unfinished, output)
    return output


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes that build the same thing waiting."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
