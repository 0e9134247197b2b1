"""Records of builds: ninja's log, device code by architecture, and what is kept of them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from attnres_ext._native import LIBRARY
from tests.tool import load_tool

tool = load_tool("time_build")
OBJECT = "CMakeFiles/attnres_ops_cpu_avx2.dir/csrc/cpu/kernels.cpp.o"
LOG = f"""# ninja log v7
1	8	179	/somewhere/CMakeFiles/cmake.verify_globs	cf17
10	2010	179	{OBJECT}	be75
20	520	179	CMakeFiles/attnres_ops.dir/csrc/ops/checks.cpp.o	80d6
5	1505	179	{OBJECT}	be76
1600	1700	179	_ops.so	fc17
"""


def test_the_last_line_of_each_output_counts(tmp_path: Path) -> None:
    path = tmp_path / ".ninja_log"
    path.write_text(LOG)
    steps = tool.read_ninja_log(path)
    assert [(step["target"], step["end"] - step["begin"]) for step in steps] == [
        ("cpu/kernels.cpp (avx2)", pytest.approx(1.5)),
        ("ops/checks.cpp", pytest.approx(0.5)),
        ("_ops.so", pytest.approx(0.1)),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not a log"),
        ("no log\n", "not a log"),
        ("# ninja log v7\n1\tx\n", "line 2: not a line"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / ".ninja_log"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + sentence):
        tool.read_ninja_log(path)


def container(*entries: tuple[int, int, int]) -> bytes:
    """Device code as nvcc lays it out; entries are kind, architecture and bytes of content."""
    content = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0, 64, size, 0, 0, 0, 0, arch).ljust(64, b"\0")
        + bytes(size)
        for kind, arch, size in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


def test_device_code_is_summed_by_architecture(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    one, other = container((2, 80, 100), (1, 90, 40)), container((2, 80, 8))
    path.write_bytes(b"host code" + one + b"more" + other + b"end")
    assert tool.device_code(path) == [
        {"arch": "sm_80", "kind": "machine code", "bytes": 100 + 8 + 2 * 64},
        {"arch": "compute_90", "kind": "PTX", "bytes": 40 + 64},
    ]
    path.write_bytes(b"host code only")
    assert tool.device_code(path) == []


@pytest.mark.parametrize("broken", [container((7, 80, 8)), container((2, 80, 8))[:40]])
def test_unknown_device_code_is_an_error(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"library\.so: device code that cannot be read"):
        tool.device_code(path)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are missing")
def test_the_built_library_is_accounted_for_to_the_byte() -> None:
    command = ["readelf", "-S", "-W", str(LIBRARY)]
    sections = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"\.nv_fatbin\s+PROGBITS\s+\w+ \w+ (\w+)", sections)
    total = sum(code["bytes"] for code in tool.device_code(LIBRARY))
    if found is None:
        assert total == 0
        return
    # What is left are the containers' own headers of 16 bytes, and padding between them.
    containers = LIBRARY.read_bytes().count(struct.pack("<I", 0xBA55ED50))
    assert 0 <= int(found[1], 16) - total <= 24 * containers


def test_a_build_tree_becomes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ninja_log").write_text(LOG)
    for line in LOG.splitlines()[2:]:
        output = tmp_path / line.split("\t")[3]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(bytes(50))
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "_ops.so").write_bytes(bytes(8) + container((2, 90, 100)))
    (installed / "_C.cpython-311-x86_64-linux-gnu.so").write_bytes(bytes(30))
    cache = "ATTNRES_CUDA_ARCHS:STRING=80;90\nCMAKE_CUDA_COMPILER:FILEPATH=/a/nvcc\n"
    (tmp_path / "CMakeCache.txt").write_text(cache)

    monkeypatch.setenv("ATTNRES_CUDA", "AUTO")
    monkeypatch.delenv("ATTNRES_CUDA_ARCHS", raising=False)
    code = {"commit": "0123", "modified": False, "csrc_sha256": "4567"}
    record = tool.describe(tmp_path, jobs=3, processor_seconds=4.5, code=code)
    assert code.items() <= record.items()
    assert record["command"] == "ATTNRES_CUDA=AUTO python tools/time_build.py --jobs 3"
    assert record["processor_seconds"] == 4.5
    assert record["seconds"] == pytest.approx(1.695)
    assert (record["jobs"], record["cuda_archs"]) == (3, ["80", "90"])
    assert {step["bytes"] for step in record["steps"]} == {50}
    sizes = {library["name"]: library["bytes"] for library in record["libraries"]}
    assert sizes == {"_C.so": 30, "_ops.so": 8 + 16 + 64 + 100}
    assert record["libraries"][1]["device_code"] == [
        {"arch": "sm_90", "kind": "machine code", "bytes": 164}
    ]
    (tmp_path / "CMakeCache.txt").write_text(
        cache.replace("/a/nvcc", "CMAKE_CUDA_COMPILER-NOTFOUND")
    )
    assert tool.describe(tmp_path, 3, 4.5, code)["cuda_archs"] == []
