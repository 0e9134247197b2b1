"""The libraries: those that are there if they fit, else built for this Python and this GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

from tools.gpu_check.process import ROOT, Run
from tools.gpu_check.python import CannotCheckError, Python

#: What nvcc takes for all kernels on few cores.
_BUILD_SECONDS = 1800
_BINDINGS_SECONDS = 300

_ASK_LIBRARY = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
print(json.dumps([torch.ops.attnres.cuda_architectures(), torch.ops.attnres.source_hash()]))
"""


def sources() -> Any:
    """``attnres_ext/sources.py``, which needs nothing that is compiled."""
    path = ROOT / "python" / "attnres_ext" / "sources.py"
    spec = importlib.util.spec_from_file_location("_sources", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_set(capability: int) -> str:
    """The set of kernels that a GPU of that compute capability (10 * major + minor) takes."""
    return "90" if capability >= 90 else "80"


def shipped_sets() -> list[str]:
    """The sets of CUDA kernels that a library as it ships holds: ``["80", "90"]``."""
    return sorted(path.name[2:] for path in (ROOT / "csrc" / "cuda").glob("sm*") if path.is_dir())


def ask(library: Path, python: Python, run: Run, logs: Path) -> tuple[str, str]:
    """The sets of CUDA kernels in ``_ops.so`` ("80,90") and the hash of the sources behind it.

    Raises:
        CannotCheckError: it is not there, or that Python's torch cannot load it.
    """
    if not library.exists():
        raise CannotCheckError("it is not built")
    asked = run([python.path, "-c", _ASK_LIBRARY, str(library)], 120, logs / "library.log", {})
    lines = asked.output.strip().splitlines() or ["no output"]
    if asked.code != 0:
        raise CannotCheckError(f"torch {python.facts['torch']} cannot load it ({lines[-1]})")
    return tuple(json.loads(lines[-1]))


def complaint(
    library: Path, python: Python, needed: str | None, run: Run, logs: Path
) -> str | None:
    """Why the operators' library cannot be taken as it is, or None.

    Args:
        library: ``_ops.so``.
        python: who will load it.
        needed: the set of CUDA kernels that must be in it, None for the CPU alone.
        run: starts programs.
        logs: where their output goes.
    """
    try:
        architectures, built_from = ask(library, python, run, logs)
    except CannotCheckError as error:
        return str(error)
    if needed is not None and needed not in architectures.split(","):
        return f'it holds the kernels "{architectures}", and this GPU takes those of set {needed}'
    if built_from != sources().source_hash(ROOT):
        return "it was built from other sources than those in csrc/"
    return None


def build_operators(python: Python, package: Path, cuda: bool, run: Run, logs: Path) -> None:
    """Compiles ``_ops.so`` as it ships, with all its sets of kernels, into ``package``.

    Raises:
        CannotCheckError: it cannot be compiled here.
    """
    tree = package.parent / "build"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(tree),
        f"-DPython_EXECUTABLE={python.path}", f"-DATTNRES_CUDA={'ON' if cuda else 'OFF'}",
    ]  # fmt: skip
    jobs = ["cmake", "--build", str(tree), "--target", "attnres_ops", "--parallel"]
    if shutil.which("cmake") is None:
        raise CannotCheckError("building _ops.so needs cmake, which is not on the PATH")
    for step, command in (("configure", configure), ("build", jobs)):
        log = logs / f"{step}.log"
        if run(command, _BUILD_SECONDS, log, {}).code != 0:
            raise CannotCheckError(f"building _ops.so failed; {log} says why")
    _put(tree / "_ops.so", package / "_ops.so")


def build_bindings(python: Python, package: Path, run: Run, logs: Path) -> None:
    """Compiles ``_C`` for this Python into ``package``; a minute on one core, without cmake.

    It says which kernels the ``_ops.so`` beside it holds.

    Raises:
        CannotCheckError: it cannot be compiled here.
    """
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise CannotCheckError("building _C needs a C++ compiler, and none is on the PATH")
    architectures, _ = ask(package / "_ops.so", python, run, logs)
    versions = (ROOT / "python" / "attnres_ext" / "version.py").read_text()
    version = re.search(r'__version__ = "(.+)"', versions)[1]
    built = package.parent / f"_C{python.facts['suffix']}"
    command = [
        compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden",
        *(f"-I{path}" for path in python.facts["includes"]),
        f"-I{ROOT / 'csrc' / 'include'}",
        f'-DATTNRES_VERSION="{version}"', f'-DATTNRES_CUDA_ARCHS="{architectures}"',
        *map(str, sorted((ROOT / "csrc" / "python").glob("*.cpp"))),
        "-o", str(built),
    ]  # fmt: skip
    log = logs / "bindings.log"
    if run(command, _BINDINGS_SECONDS, log, {}).code != 0:
        raise CannotCheckError(f"building _C for {python.path} failed; {log} says why")
    _put(built, package / built.name)


def _put(built: Path, place: Path) -> None:
    """Replaces a link to the checkout's library by the one that was built here."""
    place.unlink(missing_ok=True)
    shutil.copy2(built, place)
