"""The machine code of the built CUDA kernels: spills, widths of loads, registers, parameters.

`python tools/kernels.py` prints what is tested here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import attnres_ext
from tests.tool import load_tool

#: Bytes of kernel parameters that every supported driver takes.
MOST_PARAMETER_BYTES = 32764
#: Chunks of a thread, by policy: DepthAttentionPolicy<Elements, Loader, chunks, Team>, capacity.
DEPTH_ATTENTION = re.compile(
    r"depth_attention_(?P<way>fwd|bwd)_kernel<DepthAttentionPolicy<(?P<elements>.+), "
    r"(?P<loader>\w+), (?P<chunks>\d), (?P<team>\w+)>, (?P<capacity>\d+)>"
)
#: InterBlockPolicy<Products, Loader, Team>, capacity.
INTER_BLOCK = re.compile(
    r"inter_block_attention_(?P<way>fwd|bwd)_kernel<InterBlockPolicy<"
    r"(?P<products>Tensor|Scalar)Products<(?P<elements>.+?), (?P<matrices>\d)>, "
    r"(?P<loader>\w+), (?P<team>\w+)>, "
    r"(?P<capacity>\d+)>"
)
#: kInterBlockRegisters and kInterBlockBackwardRegisters in
#: csrc/cuda/kernels/inter_block_attention_tile.hpp
INTER_BLOCK_REGISTERS = {"fwd": 128, "bwd": 168}
#: Adds up what the CTAs of the backward found: no rows, no policy.
WEIGHT_GRADIENT = re.compile(
    r"(depth|inter_block)_attention_weight_gradient_kernel<(float|double)>"
)


tool = load_tool("kernels")


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


def with_policies(kernels: list) -> list[tuple]:
    """The kernels that take rows, each with the parts of its name."""
    found = []
    for kernel in kernels:
        if WEIGHT_GRADIENT.fullmatch(kernel.name) or INTER_BLOCK.fullmatch(kernel.name):
            continue
        parts = DEPTH_ATTENTION.fullmatch(kernel.name)
        assert parts is not None, f"{kernel.name}: give this kernel a budget"
        found.append((kernel, parts))
    return found


def inter_block(kernels: list) -> list[tuple]:
    """The kernels of phase 1, each with the parts of its name."""
    matches = [(kernel, INTER_BLOCK.fullmatch(kernel.name)) for kernel in kernels]
    return [(kernel, parts) for kernel, parts in matches if parts is not None]


def width(elements: str) -> int:
    """Values in a chunk of an elements policy."""
    if found := re.search(r"Mixed<\w+, (\d)>", elements):
        return int(found[1])
    return 4 if elements == "Uniform<float>" else 8


def test_every_architecture_has_every_kernel(kernels) -> None:
    by_arch: dict[str, set[str]] = {}
    clusters: dict[str, set[str]] = {}
    for kernel in kernels:
        # Phase 1 has one kernel for a cluster and a CTA alone, as it has one loader.
        name = re.sub("BulkTiles, CtaCluster", "BulkTiles, OneCta", kernel.name)
        if "CtaCluster" in name:
            clusters.setdefault(kernel.arch, set()).add(kernel.name)
        else:
            name = re.sub("(CpAsync|Bulk)(Ring|Tiles)", r"\2", name)
            by_arch.setdefault(kernel.arch, set()).add(name)
    names = list(by_arch.values())
    assert all(found == names[0] for found in names), by_arch.keys()
    # From 9.0 on.
    assert clusters.keys() == by_arch.keys() - {"sm_80"}
    shared = next(iter(clusters.values()), set())
    assert all(found == shared for found in clusters.values())
    # Combinations multiply quietly: more than this many want a reason.
    for stem, most in {
        "depth_attention_fwd": 13,
        "depth_attention_bwd": 7,
        "depth_attention_weight_gradient": 2,
        "inter_block_attention_fwd": 7,
        "inter_block_attention_bwd": 5,
        "inter_block_attention_weight_gradient": 2,
    }.items():
        assert sum(f"{stem}_kernel" in name for name in names[0]) <= most
    for stem, most in {"depth_attention_fwd": 7, "depth_attention_bwd": 1}.items():
        assert sum(f"{stem}_kernel" in name for name in shared) <= most


def test_nothing_lives_in_local_memory(kernels) -> None:
    spilling = [k.name for k in kernels if k.spills or k.stack or k.local]
    assert spilling == []


def test_all_shared_memory_is_dynamic(kernels) -> None:
    # Each may ask for as much as a CTA can have; from 9.0 on the tool counts what the driver takes.
    for kernel in kernels:
        assert kernel.shared == (0 if kernel.arch == "sm_80" else 1024), kernel.name


def test_registers_are_what_the_plan_counts_on(kernels) -> None:
    for kernel, parts in with_policies(kernels):
        is_double = "double" in parts["elements"]
        share = int(parts["chunks"]) * width(parts["elements"]) * (2 if is_double else 1)
        # depth_attention_registers() and depth_attention_backward_registers() in
        # csrc/cuda/kernels/depth_attention_tile.hpp; kDispatchRegisters in
        # csrc/cuda/common/elements.cuh
        dispatch = 48 if is_double else 24 if "Mixed" in parts["elements"] else 0
        budget = (2 if parts["way"] == "fwd" else 3) * share + 64 + dispatch
        if "CtaCluster" in kernel.name and kernel.arch != "sm_90":
            # The driver counts the clusters that fit. The plan only shares out slots by its count,
            # and after 9.0, where cluster addresses take more registers, may leave some unused.
            assert kernel.registers <= 128, f"{kernel.arch} {kernel.name}"
            continue
        if parts["loader"] == "BulkRing":
            assert kernel.registers <= budget, f"{kernel.arch} {kernel.name}"
            continue
        # The plan counts a producer warp that this kernel does not have: it may use those registers
        # too, as long as all CTAs that the plan wants still fit, whatever their number of threads.
        allocated = -(-kernel.registers // 8) * 8
        for threads in range(32, 481, 32):
            ctas = max(1, min(8, 65536 // (budget * (threads + 32))))
            assert allocated * threads * ctas <= 65536, f"{kernel.arch} {kernel.name}"


def test_parameters_fit(kernels) -> None:
    for kernel, parts in with_policies(kernels):
        assert kernel.constant <= MOST_PARAMETER_BYTES
        if parts["capacity"] == "16":
            # A launch copies them: a short list of sources has a short table.
            assert kernel.constant <= (2048 if parts["way"] == "fwd" else 3072), kernel.name


def test_rows_arrive_by_the_policy_s_copies(kernels) -> None:
    for kernel, parts in with_policies(kernels):
        if parts["loader"] == "BulkRing":
            assert kernel.bulk_copies == 1, kernel.name
        elif parts["loader"] == "CpAsyncRing":
            assert kernel.async_copies(wide=True) >= int(parts["chunks"]), kernel.name
            assert kernel.async_copies(wide=False) == 0, kernel.name


def test_inner_loops_read_sixteen_bytes_at_a_time(kernels) -> None:
    for kernel, parts in with_policies(kernels):
        if not parts["elements"].startswith("Uniform"):
            continue
        chunks = int(parts["chunks"])
        inner = [loop for loop in kernel.loops if loop.loads(wide=True)]
        # One loop over the sources for the logits and one for the mix; the backward has two more,
        # for <g, v> and for dv.
        assert len(inner) == (2 if parts["way"] == "fwd" else 4), (
            f"{kernel.arch} {kernel.name}: {kernel.loops}"
        )
        for loop in inner:
            wide = loop.loads(wide=True)
            # The compiler may handle several sources in an iteration; each is read once.
            assert wide % chunks == 0, f"{kernel.arch} {kernel.name}: {loop}"
            values = wide * width(parts["elements"])
            # Beside those of the values a few that the compiler sets constants with.
            assert values <= loop.multiply_adds <= 2 * values + values // 4 + 4


def test_outputs_are_written_sixteen_bytes_at_a_time(kernels) -> None:
    for kernel, parts in with_policies(kernels):
        if parts["elements"].startswith("Uniform"):
            assert kernel.global_stores(wide=True) >= int(parts["chunks"]), kernel.name


def test_phase_1_keeps_its_budget(kernels) -> None:
    for kernel, parts in inter_block(kernels):
        assert kernel.registers <= INTER_BLOCK_REGISTERS[parts["way"]], (
            f"{kernel.arch} {kernel.name}"
        )
        assert kernel.constant <= MOST_PARAMETER_BYTES
        if parts["capacity"] == "16":
            assert kernel.constant <= (2048 if parts["way"] == "fwd" else 3072), kernel.name


def test_phase_1_multiplies_on_tensor_cores(kernels) -> None:
    for kernel, parts in inter_block(kernels):
        is_tensor = parts["products"] == "Tensor"
        assert (kernel.tensor_products > 0) == is_tensor, f"{kernel.arch} {kernel.name}"
        if not is_tensor:
            continue
        # Rows and vectors are read, and results written, 16 bytes at a time.
        is_half = "half" in parts["elements"]
        sums_over_columns = [2 if is_half else 3] if parts["way"] == "fwd" else [1, 3]
        combinations = 1 if parts["way"] == "fwd" else 3
        found = sorted(
            (loop.tensor_products, loop.loads(wide=True), loop.loads(wide=False))
            for loop in kernel.loops
            if loop.tensor_products
        )
        # Over columns: twice two rows and as many eights of up to 32 vectors as they have parts.
        # Over rows: two eights of columns, weights one by one, each for four products.
        expected = [(4 * 4 * n, 4 + 8 * n, 0) for n in sums_over_columns]
        expected += [(4 * 4, 2, 4 * 2)] * combinations
        assert found == sorted(expected), f"{kernel.arch} {kernel.name}: {found}"
        assert kernel.global_stores(wide=True) >= 2 * 4, kernel.name


def test_phase_1_s_clusters_tell_one_another_sums(kernels) -> None:
    for kernel, parts in inter_block(kernels):
        shares = parts["team"] == "CtaCluster"
        assert shares == (kernel.arch != "sm_80" and parts["loader"] != "DirectTiles"), kernel.name
        assert (kernel.remote_stores > 0) == shares, f"{kernel.arch} {kernel.name}"


def test_phase_1_s_tiles_arrive_by_the_policy_s_copies(kernels) -> None:
    for kernel, parts in inter_block(kernels):
        if parts["loader"] == "BulkTiles":
            assert kernel.bulk_copies >= 1, kernel.name
        elif parts["loader"] == "CpAsyncTiles":
            assert kernel.async_copies(wide=True) >= 1, kernel.name
            assert kernel.async_copies(wide=False) == 0, kernel.name
