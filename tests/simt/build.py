"""Finds the CUDA headers and compiles the runner with the host compiler."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INCLUDES = [HERE / "include", HERE, ROOT / "csrc" / "include", ROOT / "csrc" / "cuda"]
HEADERS = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h")

#: Flags of the two builds. Optimised, the sanitized one takes a minute to compile.
FLAVOURS = {
    "plain": ["-O1"],
    "sanitized": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


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


def build_runner(flavour: str) -> Path:
    """Compiles the runner unless its sources are as they were; returns the executable."""
    include = cuda_include_dir()
    cxx = compiler()
    assert include is not None
    assert cxx is not None
    command = [cxx, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += FLAVOURS[flavour]
    command += [f"-I{path}" for path in INCLUDES] + ["-isystem", str(include)]
    sources = sorted(
        path
        for folder in INCLUDES
        for path in folder.rglob("*")
        if path.suffix in {".cpp", ".hpp", ".cuh"}
    )
    digest = hashlib.sha256(repr(command).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    runner = folder / f"runner-{flavour}-{digest.hexdigest()[:16]}"
    if not runner.exists():
        for old in folder.glob(f"runner-{flavour}-*"):
            old.unlink(missing_ok=True)
        unfinished = folder / f".{runner.name}.{os.getpid()}"
        inputs = [str(path) for path in sorted(HERE.glob("*.cpp"))]
        done = subprocess.run(
            [*command, *inputs, "-o", str(unfinished)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        os.replace(unfinished, runner)
    return runner
