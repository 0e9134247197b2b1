"""The machine code of the built CUDA kernels: spills, widths of loads, registers, parameters.

`python tools/kernels.py` prints what is tested here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

import attnres_ext
from tests.tool import load_tool

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(attnres_ext.__file__).parent / "_ops.so"
#: Chips that a set of kernels has machine code for, and what its PTX is for, as in
#: cmake/Cuda.cmake.
CHIPS = {"sm80": {"sm_80"}, "sm90": {"sm_90", "sm_100", "sm_120"}}
PTX = {"sm90": "sm_90"}

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
#: csrc/cuda/inter_block_attention/rows_tile.hpp
INTER_BLOCK_REGISTERS = {"fwd": 128, "bwd": 168}
#: Adds up what the CTAs of the backward found: no rows, no policy.
WEIGHT_GRADIENT = re.compile(
    r"(depth|inter_block)_attention_weight_gradient_kernel<(float|double)>"
)
#: Storage and columns of a warp.
TILE = re.compile(r"depth_attention_tile_fwd_kernel<(?P<storage>\w+), (?P<columns>\d+)>")
#: kTileRegisters in csrc/cuda/depth_attention/config.hpp
TILE_REGISTERS = 96
#: Instructions that a computing warp may spend on a row of up to 13 sources: for each slice of 64
#: columns 16 + 4 products, 8 loads and what writes them, 40 in all, and 125 whatever its columns. A
#: lane's share of ten sources is 20 values a slice, so that 192 columns get 4.1 a value.
TILE_ROW_INSTRUCTIONS = {columns: 125 + 40 * columns // 64 for columns in (64, 128, 192, 256)}
#: Storage, and whether there is an output norm.
BACKWARD_TILE = re.compile(r"depth_attention_tile_bwd_kernel<(?P<storage>\w+), (?P<norm>\w+)>")
#: Storage, columns of a warp, and tokens of a stage.
PHASE_ONE_TILE = re.compile(
    r"inter_block_attention_tile_fwd_kernel<(?P<storage>\w+), (?P<columns>\d+), (?P<tokens>\d)>"
)
#: Instructions that a computing warp may spend on a stage: for each slice of 16 columns up to three
#: products with queries, two or four with weights, two loads and what writes results, which float16
#: scales; and whatever its columns. The loop over squares takes 32 columns at a time: eight
#: products, two loads.
PHASE_ONE_SLICE_INSTRUCTIONS = {"__nv_bfloat16": 9, "__half": 11}
PHASE_ONE_STAGE_INSTRUCTIONS = 140
PHASE_ONE_SQUARES_INSTRUCTIONS = 16
#: Storage, and chunks of a lane.
MERGE = re.compile(r"merge_partial_(?P<way>fwd|bwd)_kernel<(?P<storage>\w+), (?P<chunks>\d)>")
#: kMergeChoices and kMergeBackwardChoices in csrc/cuda/merge_partial/config.hpp: threads of a CTA,
#: by chunks.
MERGE_THREADS = {"fwd": {1: 1024, 3: 512, 4: 512}, "bwd": {1: 640, 2: 512}}
#: Rows that merging loads.
MERGE_LOADS = {"fwd": 3, "bwd": 4}
#: Instructions that a warp may spend on a row without delta, norm or what gradients are added to:
#: for each chunk, and whatever its chunks.
MERGE_ROW_INSTRUCTIONS = {"fwd": (50, 200), "bwd": (310, 180)}


tool = load_tool("kernels")


@pytest.fixture(scope="module")
def kernels() -> list:
    """All kernels of the library under test."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY} is not built")
    if tool.find_tool("cuobjdump") is None or tool.find_tool("nvdisasm") is None:
        pytest.skip("cuobjdump and nvdisasm are not installed")
    found = tool.read_kernels(LIBRARY)
    if not found:
        pytest.skip("this build holds no CUDA kernels")
    if not all("<" in kernel.name for kernel in found):
        pytest.skip("no c++filt to read kernel names with")
    return found


def set_of(symbol: str) -> str | None:
    """The set that a name in ``attnres::cuda`` is of, if it says so."""
    found = re.match(r"_ZN7attnres4cuda4(sm\d\d)", symbol)
    return found[1] if found else None


def started_by(library: Path) -> set[str]:
    """The kernels that launchers in a library can start: those whose names it tells the driver."""
    found = set()
    for match in re.finditer(rb"\0(_ZN7attnres4cuda(?:4sm\d\d)?(\d+)(\w+))", library.read_bytes()):
        symbol, length, rest = match.groups()
        # All kernels are templates.
        name, arguments = rest[: int(length)], rest[int(length) :]
        if name.endswith(b"_kernel") and arguments.startswith(b"I"):
            found.add(symbol.decode())
    return found


def in_several_sets(names_by_set: dict[str, Iterable[str]]) -> list[str]:
    """Names that more than one set has."""
    sets = defaultdict(set)
    for name_of_set, names in names_by_set.items():
        for name in names:
            sets[name].add(name_of_set)
    return sorted(name for name, found in sets.items() if len(found) > 1)


def test_no_two_sets_have_a_kernel_of_the_same_name(kernels) -> None:
    """A linker would keep one of them, and launch it on the other set's chips."""
    symbols = {
        name: {kernel.symbol for kernel in kernels if kernel.arch in chips}
        for name, chips in CHIPS.items()
    }
    assert in_several_sets(symbols) == []
    for name, found in symbols.items():
        assert {set_of(symbol) for symbol in found} <= {name}


def test_what_is_started_has_code_for_every_chip_of_its_set(kernels) -> None:
    started = started_by(LIBRARY)
    assert started >= {kernel.symbol for kernel in kernels}
    chips: dict[str, set[str]] = {symbol: set() for symbol in started}
    for kernel in kernels:
        chips[kernel.symbol].add(kernel.arch)
    assert chips == {symbol: CHIPS.get(set_of(symbol) or "") for symbol in started}
    ptx = tool.read_ptx(LIBRARY)
    for name, arch in PTX.items():
        of_set = {symbol for symbol in started if set_of(symbol) == name}
        assert ptx.get(arch, set()) == of_set


def test_sets_share_nothing_but_what_headers_of_the_host_define() -> None:
    """Of what two sets have in common a linker keeps one: a launcher, say, with its kernels."""
    build = next((ROOT / "build").glob("*/CMakeFiles/attnres_ops_sm*.dir"), None)
    if build is None or shutil.which("nm") is None:
        pytest.skip("no objects of the sets, or no nm to read them with")
    names = {}
    for folder in build.parent.glob("attnres_ops_sm*.dir"):
        command = ["nm", "--portability", "--defined-only", "--extern-only"]
        command += [str(path) for path in folder.rglob("*.o")]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        names[folder.name] = {line.split()[0] for line in listed.splitlines() if "attnres" in line}
    headers = " ".join(path.read_text() for path in (ROOT / "csrc").rglob("*.hpp"))
    for symbol in in_several_sets(names):
        # A function, or a lambda in one.
        function = re.match(r"_ZZ?NK?7attnres(?:4cuda)?(\d+)(\w+)", symbol)
        assert function is not None, symbol
        assert re.search(rf"\b{function[2][: int(function[1])]}\b", headers), symbol


def with_policies(kernels: list) -> list[tuple]:
    """The kernels that take rows, each with the parts of its name."""
    found = []
    for kernel in kernels:
        others = (WEIGHT_GRADIENT, INTER_BLOCK, TILE, BACKWARD_TILE, PHASE_ONE_TILE, MERGE)
        if any(other.fullmatch(kernel.name) for other in others):
            continue
        parts = DEPTH_ATTENTION.fullmatch(kernel.name)
        assert parts is not None, f"{kernel.name}: give this kernel a budget"
        found.append((kernel, parts))
    return found


def inter_block(kernels: list) -> list[tuple]:
    """The kernels of phase 1, each with the parts of its name."""
    matches = [(kernel, INTER_BLOCK.fullmatch(kernel.name)) for kernel in kernels]
    return [(kernel, parts) for kernel, parts in matches if parts is not None]


def tiles(kernels: list) -> list[tuple]:
    """The kernels of the tensor-core tile, each with the parts of its name."""
    matches = [(kernel, TILE.fullmatch(kernel.name)) for kernel in kernels]
    return [(kernel, parts) for kernel, parts in matches if parts is not None]


def merges(kernels: list) -> list[tuple]:
    """The kernels that merge, each with the parts of its name."""
    matches = [(kernel, MERGE.fullmatch(kernel.name)) for kernel in kernels]
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
        of_tile = any(one.fullmatch(name) for one in (TILE, BACKWARD_TILE, PHASE_ONE_TILE))
        if "CtaCluster" in name or of_tile:
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
        "merge_partial_fwd": 6,
        "merge_partial_bwd": 4,
        "inter_block_attention_fwd": 7,
        "inter_block_attention_bwd": 5,
        "inter_block_attention_weight_gradient": 2,
    }.items():
        assert sum(f"{stem}_kernel" in name for name in names[0]) <= most
    shared_kernels = {"depth_attention_fwd": 7, "depth_attention_bwd": 1}
    tile_kernels = {
        "depth_attention_tile_fwd": 8,
        "depth_attention_tile_bwd": 3,
        "inter_block_attention_tile_fwd": 12,
    }
    for stem, most in {**shared_kernels, **tile_kernels}.items():
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
        # csrc/cuda/depth_attention/rows_tile.hpp; kDispatchRegisters in
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
        combinations = [1] if parts["way"] == "fwd" else [1, 1, 2]
        found = sorted(
            (loop.tensor_products, loop.loads(wide=True), loop.loads(wide=False))
            for loop in kernel.loops
            if loop.tensor_products
        )
        # Over columns: twice two rows and as many eights of up to 32 vectors as they have parts.
        # Over rows: two eights of columns, weights one by one, each for four products; twice as
        # many weights where the result is in float32.
        expected = [(4 * 4 * n, 4 + 8 * n, 0) for n in sums_over_columns]
        expected += [(4 * 4 * n, 2, 4 * 2 * n) for n in combinations]
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


def test_the_tile_keeps_its_budget(kernels) -> None:
    for kernel, _ in tiles(kernels):
        name = f"{kernel.arch} {kernel.name}"
        assert kernel.registers <= TILE_REGISTERS, name
        assert kernel.constant <= 4096, name
        # A bulk copy for each of a lane's two rows; what CTAs of a cluster tell one another.
        assert kernel.bulk_copies > 0, name


def test_the_tile_spends_few_instructions_on_a_value(kernels) -> None:
    for kernel, parts in tiles(kernels):
        name = f"{kernel.arch} {kernel.name}"
        assert kernel.row_instructions is not None, name
        assert kernel.row_instructions <= TILE_ROW_INSTRUCTIONS[int(parts["columns"])], name


def test_the_tile_has_loads_under_way_before_it_multiplies(kernels) -> None:
    for kernel, parts in tiles(kernels):
        # Each is 512 bytes for a warp, and a warp of 64 columns has only four of them. Memory of
        # 12.0 is slow enough for fewer.
        least = 2 if parts["columns"] == "64" else 3 if kernel.arch == "sm_120" else 4
        assert kernel.matrix_loads_ahead >= least, f"{kernel.arch} {kernel.name}"


def test_the_backward_s_tile_keeps_its_budget(kernels) -> None:
    for kernel in kernels:
        if BACKWARD_TILE.fullmatch(kernel.name) is None:
            continue
        name = f"{kernel.arch} {kernel.name}"
        # kMostBackwardThreads in csrc/cuda/depth_attention/backward_config.hpp
        assert kernel.registers * 512 <= 65536, name
        loops = [loop for loop in kernel.loops if loop.tensor_products]
        assert len(loops) == 2, f"{name}: {loops}"
        products, gradients = sorted(loops, key=lambda loop: loop.tensor_products)
        # Of three slices of 64 columns, 16 at a time: each is loaded once for the products and once
        # for the gradients, with those that exist, and stored once.
        assert (products.matrix_loads, products.matrix_stores) == (12, 0), name
        assert products.tensor_products == 12 * 4, name
        assert (gradients.matrix_loads, gradients.matrix_stores) == (2 * 12, 12), name
        assert gradients.tensor_products == 12 * (8 + 1), name
        # Nobody waits for a load at a time.
        assert products.matrix_loads_ahead >= 4, name
        assert gradients.matrix_loads_ahead >= 4, name
        # Lane instructions for each value read or written: ten sources, as many gradients that
        # exist, as many that are made of them, and the incoming one. A warp takes some 100 besides
        # for a row, whatever its columns.
        instructions = products.instructions + gradients.instructions + 100
        assert instructions * 32 <= 6 * (3 * 10 + 1) * 192, f"{name}: {instructions}"


def test_merging_keeps_a_row_in_registers(kernels) -> None:
    assert merges(kernels) != []
    for kernel, parts in merges(kernels):
        name = f"{kernel.arch} {kernel.name}"
        way, chunks = parts["way"], int(parts["chunks"])
        allocated = -(-kernel.registers // 8) * 8
        assert allocated * MERGE_THREADS[way][chunks] <= 65536, name
        assert kernel.constant <= 4096, name
        # The first row's loads, and the next one's, 16 bytes at a time; what gradients are added to
        # is loaded with its own row.
        assert kernel.row_loads == (2 * MERGE_LOADS[way] - (way == "bwd")) * chunks, name
        of_chunk, of_row = MERGE_ROW_INSTRUCTIONS[way]
        assert kernel.row_instructions is not None, name
        assert kernel.row_instructions <= of_row + of_chunk * chunks, name


def test_phase_1_s_tile_keeps_its_budget(kernels) -> None:
    found = [(kernel, PHASE_ONE_TILE.fullmatch(kernel.name)) for kernel in kernels]
    for kernel, parts in found:
        if parts is None:
            continue
        name = f"{kernel.arch} {kernel.name}"
        # kMostInterBlockTileThreads in csrc/cuda/inter_block_attention/config.hpp
        assert kernel.registers * 512 <= 65536, name
        assert kernel.constant <= 4096, name
        slices = int(parts["columns"]) // 16
        # Rows are loaded once for products, once for squares and once for results.
        loads, stores = (tool.count(kernel.opcodes, stem) for stem in ("LDSM", "STSM"))
        of_squares = [loop for loop in kernel.loops if loop.tensor_products]
        assert [(one.matrix_loads, one.tensor_products) for one in of_squares] == [(2, 8)], name
        assert of_squares[0].instructions <= PHASE_ONE_SQUARES_INSTRUCTIONS, name
        assert loads == 2 * slices + 2, name
        assert stores == int(parts["tokens"]) * slices // 2, name
        # The shortest way round has one time round the loop over squares.
        of_slice = PHASE_ONE_SLICE_INSTRUCTIONS[parts["storage"]]
        most = PHASE_ONE_STAGE_INSTRUCTIONS + of_slice * slices
        assert kernel.row_instructions is not None, name
        assert kernel.row_instructions <= most, f"{name}: {kernel.row_instructions}"
