"""Builds the runner and the operators' library with a simulated GPU, with the host compiler."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.gpu_check.build import sources as hashing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = [ROOT / "csrc" / "include", ROOT / "csrc" / "cuda"]
INCLUDES = [HERE / "include", HERE, *CSRC]
RUNTIME = HERE / "runtime"
HEADERS = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h")
BUILD = ROOT / "build" / "simt"

WARNINGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
#: How kernels are run: their source, compiled for the CPU; and that under sanitizers.
FLAVOURS = ["plain", "sanitized"]
#: Flags of the two builds. Optimised, the sanitized one takes a minute to compile. One operation is
#: one rounding: none are contracted.
FLAGS = {
    "plain": ["-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE"],
    "sanitized": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
#: The same for the operators' library, in which much more is run. Jumps from stack to stack are
#: no errors.
LIBRARY_FLAGS = ["-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
LIBRARY_DEFINITIONS = [
    "TORCH_TARGET_VERSION=0x020a000000000000",
    'ATTNRES_CUDA_ARCHITECTURES="80,90"',
]
#: Kernel sets, as numbers of architectures.
SETS = ("80", "90")
#: One program runs all sets: names say that, and not which one.
SET = "simulated"


@dataclass(frozen=True)
class Runner:
    """An executable that runs cases."""

    executable: Path

    def __call__(self, cases: Path, results: Path) -> str:
        """Runs a file of cases; returns what was printed, or fails with it."""
        command = [str(path) for path in (self.executable, cases, results)]
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


def missing() -> str | None:
    """What this machine lacks to build anything here."""
    if cuda_include_dir() is None:
        return "no CUDA headers on this machine"
    if compiler() is None:
        return "no C++ compiler on this machine"
    return None


def runner_or_skip(flavour: str) -> Runner:
    """A flavour's runner, where this machine can build it."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return Runner(build_executable(flavour))


def build_executable(flavour: str) -> Path:
    """The runner, of the flavour "plain" or "sanitized"."""
    command = [str(compiler()), *WARNINGS, *FLAGS[flavour], f"-DATTNRES_CUDA_SET={SET}"]
    command += [f"-I{path}" for path in INCLUDES] + ["-isystem", str(cuda_include_dir())]
    command += [str(path) for path in sorted(HERE.glob("*.cpp"))]
    return build(f"runner-{flavour}", command, sources_in(INCLUDES))


def build_library() -> Path:
    """The operators' library with a simulated GPU."""
    sources = sources_in([*INCLUDES, ROOT / "csrc" / "ops"])
    generated = BUILD / "generated"
    generated.mkdir(parents=True, exist_ok=True)
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    compile_ = [*filter(None, [shutil.which("ccache")]), str(compiler()), "-fPIC"]
    compile_ += [*WARNINGS, *LIBRARY_FLAGS]
    compile_ += [f"-I{path}" for path in (*INCLUDES, generated)]
    compile_ += [f"-isystem{path}" for path in (torch / "include", cuda_include_dir())]
    compile_ += [f"-D{name}" for name in LIBRARY_DEFINITIONS]

    def objects(folder: Path) -> list[Path]:
        """Compiles each file, two at a time and the largest first."""

        def compile_one(path: Path) -> Path:
            output = folder / f"{path.parent.name}-{path.stem}.o"
            # As in the library that ships; but kernels must be found by their addresses.
            hidden = ["-fvisibility=hidden"] if path.parent.name == "ops" else []
            run([*compile_, *hidden, "-x", "c++", "-c", str(path), "-o", str(output)])
            return output

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compile_one, library_sources()))

    def link(output: Path) -> None:
        (generated / "attnres_source_hash.hpp").write_text(
            f'#define ATTNRES_SOURCE_HASH "{hashing().source_hash(ROOT)}"\n'
        )
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            command = [str(compiler()), "-shared", *LIBRARY_FLAGS]
            # What stands in for others is found here, whoever else has it.
            command += ["-Wl,-Bsymbolic", "-Wl,--no-undefined"]
            command += [str(path) for path in objects(Path(folder))]
            libraries = torch / "lib"
            command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-ltorch"]
            run([*command, "-o", str(output)])

    return made("simulated.so", [repr(compile_)], sources, link)


def library_sources() -> list[Path]:
    """The operators, the CUDA backend, and a simulated GPU in the place of the CPU backend."""
    cuda = [path for name in SETS for path in sorted((CSRC[1] / f"sm{name}").glob("*.cu"))]
    ops = sorted((ROOT / "csrc" / "ops").glob("*.cpp"))
    ops = [path for path in ops if path.name != "cuda_absent.cpp"]
    simulated = [HERE / "executor.cpp", RUNTIME / "runtime.cpp", RUNTIME / "library.cpp"]
    return [*reversed(cuda), *ops, CSRC[1] / "ops_cuda.cpp", *simulated]


def build_launch_test() -> Path:
    """The test of csrc/cuda/launch.cuh."""
    command = [str(compiler()), *WARNINGS, *FLAGS["sanitized"], "-rdynamic"]
    command += [f"-I{path}" for path in INCLUDES] + ["-isystem", str(cuda_include_dir())]
    sources = [HERE / "executor.cpp", RUNTIME / "runtime.cpp", RUNTIME / "test_launch.cpp"]
    command += [str(path) for path in sources]
    return build("test-launch", command, [*sources_in(INCLUDES), ROOT / "tests/cpp/check.hpp"])


def sources_in(folders: Iterable[Path]) -> list[Path]:
    """Every file that a compiler may read there."""
    suffixes = {".cpp", ".hpp", ".cu", ".cuh"}
    return sorted({p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes})


def build(name: str, command: Sequence[str], sources: Iterable[Path]) -> Path:
    """What the command writes to ``-o``, unless sources and command are as they were."""
    return made(name, [repr(command)], sources, lambda output: run([*command, "-o", str(output)]))


def made(
    name: str, keys: Iterable[str], sources: Iterable[Path], make: Callable[[Path], None]
) -> Path:
    """The file that ``make(path)`` writes, unless sources and keys are as they were."""
    digest = hashlib.sha256("".join(keys).encode())
    for source in sources:
        digest.update(source.read_bytes())
    output = BUILD / f"{digest.hexdigest()[:16]}-{name}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with locked(BUILD / f".{name}.lock"):
        if not output.exists():
            old = [*BUILD.glob(f"*-{name}")]
            unfinished = BUILD / f".{output.name}.unfinished"
            make(unfinished)
            os.replace(unfinished, output)
            for path in old:
                path.unlink()
    return output


def run(command: Sequence[str]) -> None:
    """Runs it; fails with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes that build the same thing waiting."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
