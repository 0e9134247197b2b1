"""The machine code of the built CUDA kernels: spills, widths of loads, registers, parameters.

`python tools/kernels.py` prints what is tested here.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import attnres_ext

ROOT = Path(__file__).resolve().parents[2]
#: Bytes of kernel parameters that every supported driver takes.
MOST_PARAMETER_BYTES = 32764
#: Chunks of a thread, by policy: DepthAttentionPolicy<Elements, Loader, chunks>, capacity.
DEPTH_ATTENTION = re.compile(
    r"depth_attention_fwd_kernel<DepthAttentionPolicy<(?P<elements>.+), (?P<loader>\w+), "
    r"(?P<chunks>\d)>, (?P<capacity>\d+)>"
)


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_tool", ROOT / "tools" / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(scope="module")
def kernels() -> list:
    """All kernels of the library under test."""
    library = Path(attnres_ext.__file__).parent / "_ops.so"
    if not library.exists():
        pytest.skip(f"{library} is not built")
    if tool.find_tool("cuobjdump") is None or tool.find_tool("nvdisasm") is None:
        pytest.skip("cuobjdump and nvdisasm are not installed")
    found = tool.read_kernels(library)
    if not found:
        pytest.skip("this build holds no CUDA kernels")
    if not all("<" in kernel.name for kernel in found):
        pytest.skip("no c++filt to read kernel names with")
    return found


def parts(kernel) -> re.Match[str]:
    found = DEPTH_ATTENTION.fullmatch(kernel.name)
    assert found is not None, f"{kernel.name}: give this kernel a budget"
    return found


def width(elements: str) -> int:
    """Values in a chunk of an elements policy."""
    if found := re.search(r"Mixed<\w+, (\d)>", elements):
        return int(found[1])
    return 4 if elements == "Uniform<float>" else 8


def test_every_architecture_has_every_kernel(kernels) -> None:
    by_arch: dict[str, set[str]] = {}
    for kernel in kernels:
        name = re.sub("CpAsyncRing|BulkRing", "Ring", kernel.name)
        by_arch.setdefault(kernel.arch, set()).add(name)
    names = list(by_arch.values())
    assert all(found == names[0] for found in names), by_arch.keys()
    # Combinations multiply quietly: more than this many want a reason.
    assert len(names[0]) <= 16


def test_nothing_lives_in_local_memory(kernels) -> None:
    spilling = [k.name for k in kernels if k.spills or k.stack or k.local]
    assert spilling == []


def test_registers_are_what_the_plan_counts_on(kernels) -> None:
    for kernel in kernels:
        found = parts(kernel)
        words = 2 if "double" in found["elements"] else 1
        # depth_attention_registers() in csrc/cuda/kernels/depth_attention_tile.hpp
        budget = 2 * int(found["chunks"]) * width(found["elements"]) * words + 64
        assert kernel.registers <= budget, f"{kernel.arch} {kernel.name}"


def test_parameters_fit(kernels) -> None:
    for kernel in kernels:
        assert kernel.constant <= MOST_PARAMETER_BYTES
        if parts(kernel)["capacity"] == "16":
            # A launch copies them: a short list of sources has a short table.
            assert kernel.constant <= 2048


def test_rows_arrive_by_the_policy_s_copies(kernels) -> None:
    for kernel in kernels:
        loader = parts(kernel)["loader"]
        if loader == "BulkRing":
            assert kernel.bulk_copies == 1, kernel.name
        elif loader == "CpAsyncRing":
            assert kernel.async_copies(wide=True) >= int(parts(kernel)["chunks"]), kernel.name
            assert kernel.async_copies(wide=False) == 0, kernel.name


def test_inner_loops_read_sixteen_bytes_at_a_time(kernels) -> None:
    for kernel in kernels:
        found = parts(kernel)
        if not found["elements"].startswith("Uniform"):
            continue
        chunks = int(found["chunks"])
        inner = [loop for loop in kernel.loops if loop.loads(wide=True)]
        # One loop over the sources for the logits and one for the mix.
        assert len(inner) == 2, f"{kernel.arch} {kernel.name}: {kernel.loops}"
        for loop in inner:
            wide = loop.loads(wide=True)
            # The compiler may handle several sources in an iteration; each is read once.
            assert wide % chunks == 0, f"{kernel.arch} {kernel.name}: {loop}"
            values = wide * width(found["elements"])
            assert values <= loop.multiply_adds <= 2 * values + 4


def test_outputs_are_written_sixteen_bytes_at_a_time(kernels) -> None:
    for kernel in kernels:
        if parts(kernel)["elements"].startswith("Uniform"):
            assert kernel.global_stores(wide=True) >= int(parts(kernel)["chunks"]), kernel.name
