"""The two shared libraries: what they need, what they show, and what they must not know."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnres_ext import _C
from attnres_ext._native import LIBRARY

pytestmark = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None, reason="binutils are missing"
)
BINDINGS = Path(_C.__file__)


def output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def symbols(library: Path, *options: str) -> list[tuple[str, str]]:
    """Type and readable name of every dynamic symbol."""
    lines = output("nm", "-D", "-C", *options, library).splitlines()
    found = [re.match(r"(?:[0-9a-f]{16}|\s{16}) (\w) (.+)", line) for line in lines]
    return [(match[1], match[2]) for match in found if match]


def dynamic(library: Path, tag: str) -> list[str]:
    pattern = rf"\({tag}\).*\[(.+)\]"
    return re.findall(pattern, output("readelf", "-d", "-W", library))


def test_operators_know_neither_python_nor_torch_internals() -> None:
    names = [name for _, name in symbols(LIBRARY)]
    assert len(names) > 20, "nm showed nothing"
    strange = [n for n in names if re.search(r"\b(c10|at)::|^_?Py[A-Z_]|\bpybind11::", n)]
    assert strange == []


def test_operators_need_no_cuda_and_no_python() -> None:
    needed = dynamic(LIBRARY, "NEEDED")
    assert "libtorch_cpu.so" in needed
    # Where torch has CUDA, libtorch brings libtorch_cuda.
    assert "libtorch.so" in needed
    refused = ("libtorch_cuda", "libc10", "libcudart", "libcuda.", "libpython", "libtorch_python")
    assert [name for name in needed if name.startswith(refused)] == []
    assert dynamic(LIBRARY, "RUNPATH") + dynamic(LIBRARY, "RPATH") == ["$ORIGIN/../torch/lib"]


def test_the_one_symbol_of_a_cuda_torch_is_weak() -> None:
    kinds = {name: kind for kind, name in symbols(LIBRARY, "--undefined-only")}
    stream = "aoti_torch_get_current_cuda_stream"
    if torch.ops.attnres.cuda_architectures():
        assert kinds[stream] == "w"
    else:
        assert stream not in kinds


def test_operators_show_nothing_of_their_inside() -> None:
    shown = [name for _, name in symbols(LIBRARY, "--defined-only")]
    # The static CUDA runtime must not answer in the place of torch's.
    assert [name for name in shown if re.match(r"_*cuda|attnres::", name)] == []


def test_operators_are_small() -> None:
    assert LIBRARY.stat().st_size <= 30 * 2**20


def test_bindings_know_no_torch() -> None:
    needed = dynamic(BINDINGS, "NEEDED")
    assert [name for name in needed if name.startswith(("libtorch", "libc10"))] == []
    names = [name for _, name in symbols(BINDINGS)]
    assert [name for name in names if re.search(r"\b(c10|at|torch)::|^aoti_|^torch_", name)] == []


def test_the_audit_calls_the_operators_stable() -> None:
    audit = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    if audit is None:
        pytest.skip("torch-abi-audit is not installed")
    report = json.loads(output(audit, "--json", "--check", "torch", LIBRARY))
    (library,) = report["extensions"] + report["bundled_libs"]
    assert library["torch"]["stable"]
    assert library["torch"]["unstable_symbols"] == []
    # The oldest torch that the project promises to run under.
    assert library["torch"]["min_torch_version"] == "2.10.0"
