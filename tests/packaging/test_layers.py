"""Who may include what (docs/architecture.md), and one stem per operator in every folder."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from attnres_ext import ops, reference

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SUFFIXES = {".hpp", ".cpp", ".cuh", ".cu"}

#: Operators, by the stem that their files share.
OPERATORS = (
    "depth_attention",
    "accumulate_depth_attention",
    "inter_block_attention",
    "merge_partial",
    "block_cache",
)
#: The others fill in the parameters of one of these.
CPU_KERNELS = ("depth_attention", "inter_block_attention", "block_cache")

INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*([<\"][^>\"]+[>\"])", re.MULTILINE)
STANDARD = re.compile(r"<[a-z0-9_]+>")
TORCH_STABLE = re.compile(r"<torch/(csrc/stable|headeronly)/[\w/]+\.h>")
CUDA = re.compile(r"<(cuda\w*\.h|cub/.+|cute/.+|cutlass/.+|cooperative_groups.*)>")
INTRINSICS = re.compile(r"<(immintrin|arm_neon|stdint|stddef)\.h>")
#: They ask the processor what it has.
PROCESSOR = re.compile(r"<(cpuid|sys/auxv)\.h>")
PYBIND = re.compile(r"<pybind11/\w+\.h>")
VOCABULARY = re.compile(r'"attnres/\w+\.hpp"')
#: What kernels are launched with: pure functions, which include no CUDA either.
CONFIGURATION = re.compile(r'"(kernel_sets|\w+/(backward_)?config)\.hpp"')
GENERATED = re.compile(r'"attnres_source_hash\.hpp"')


def own(*folders: str) -> re.Pattern[str]:
    """Headers of these folders of ``csrc``, by their path or by their name alone."""
    names = set()
    for folder in folders:
        for path in (CSRC / folder).rglob("*"):
            if path.suffix in {".hpp", ".cuh"}:
                names |= {path.name, path.relative_to(CSRC / folder).as_posix()}
    return re.compile('"(' + "|".join(map(re.escape, sorted(names))) + ')"')


def kind_of(path: Path) -> str:
    """Which row of the table a file is in."""
    relative = path.relative_to(CSRC).as_posix()
    if relative == "cuda/ops_cuda.cpp":
        return "cuda operators"
    if relative.startswith("cpu/"):
        once = ("cpu/cpu_backend.cpp", "cpu/instruction_sets.cpp")
        return "cpu backend" if relative in once else "cpu kernels"
    return relative.split("/")[0]


ALLOWED = {
    "include": [STANDARD, VOCABULARY],
    "cuda": [STANDARD, VOCABULARY, CUDA, own("cuda")],
    "cuda operators": [STANDARD, VOCABULARY, CUDA, TORCH_STABLE, own("cuda")],
    "ops": [STANDARD, VOCABULARY, TORCH_STABLE, GENERATED, own("ops")],
    "cpu backend": [STANDARD, VOCABULARY, TORCH_STABLE, PROCESSOR, own("cpu")],
    # Compiled once per instruction set: an inline function of the C++ library would be merged
    # across them.
    "cpu kernels": [re.compile(r'"attnres/params\.hpp"'), INTRINSICS, own("cpu")],
    "python": [STANDARD, VOCABULARY, PYBIND, CONFIGURATION, own("python")],
}
COMMENTS_AND_STRINGS = re.compile(r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"")
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in SUFFIXES)


def code_of(path: Path) -> str:
    """A file without comments and strings."""
    return COMMENTS_AND_STRINGS.sub("", path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes_only_what_its_folder_may(path: Path) -> None:
    kind = kind_of(path)
    for include in INCLUDE.findall(path.read_text()):
        assert any(allowed.fullmatch(include) for allowed in ALLOWED[kind]), (
            f"csrc/{path.relative_to(CSRC)} includes {include}, which {kind} may not"
        )


def test_every_folder_is_in_the_table() -> None:
    assert {kind_of(path) for path in FILES} == ALLOWED.keys()
    strange = [p.name for p in CSRC.rglob("*") if p.is_file() and p.suffix not in SUFFIXES]
    assert strange == []


@pytest.mark.parametrize("name", ["vector", "torch/torch.h"])
def test_the_table_refuses(name: str) -> None:
    include = f"<{name}>"
    assert not any(allowed.fullmatch(include) for allowed in ALLOWED["cpu kernels"])
    assert name == "vector" or not any(a.fullmatch(include) for a in ALLOWED["ops"])


@pytest.mark.parametrize("kind", ["cuda", "include", "python", "cpu kernels"])
def test_names_no_namespace_of_torch(kind: str) -> None:
    for path in FILES:
        if kind_of(path) == kind:
            assert not re.search(r"\b(torch|at|c10)::", code_of(path)), path.relative_to(ROOT)


@pytest.mark.parametrize("kind", ["ops", "cpu backend", "cuda operators"])
def test_operators_use_the_stable_interface_alone(kind: str) -> None:
    for path in FILES:
        if kind_of(path) == kind:
            found = re.search(r"\b(at|c10)::|\bPy[A-Z]\w+", code_of(path))
            assert found is None, f"{path.relative_to(ROOT)} names {found[0]}"


def test_kernel_bodies_know_no_architecture() -> None:
    for folder in ("common", *OPERATORS):
        for path in (CSRC / "cuda" / folder).rglob("*"):
            found = re.search(r"__CUDA_ARCH__|\bsm_?[0-9]{2,3}\b", code_of(path))
            wrapper = path.name == "instructions.cuh"
            assert wrapper or found is None, f"{path.relative_to(ROOT)} names {found[0]}"


#: Merging fills in depth attention's parameters, and depth attention's launchers ask whether it
#: serves them.
RELATED = ({"depth_attention", "merge_partial"},)


def test_kernels_of_an_operator_include_no_other_s() -> None:
    """And what is common to all includes no operator's."""
    operators = {path.name for path in (CSRC / "cuda").iterdir() if path.name in OPERATORS}
    for path in (CSRC / "cuda").rglob("*"):
        folder = path.parent.name
        if not path.is_file() or folder not in operators | {"common"}:
            continue
        for include in INCLUDE.findall(path.read_text()):
            other = include.strip('"').split("/")[0]
            assert other not in operators - {folder} or {folder, other} in RELATED, (
                f"{path.relative_to(ROOT)} includes {include}"
            )


def test_device_code_lives_in_the_namespace_of_its_set() -> None:
    for path in sorted((CSRC / "cuda").rglob("*.cuh")):
        opened = re.findall(r"^namespace ([^{]+) \{", code_of(path), re.MULTILINE)
        expected = [] if path.name == "set.cuh" else ["attnres::cuda::inline ATTNRES_CUDA_SET"]
        assert opened == expected, path.relative_to(ROOT)
    for path in sorted((CSRC / "cuda").glob("sm*/*.cu")):
        assert f"#define ATTNRES_CUDA_SET {path.parent.name}\n" in path.read_text()


def test_special_instructions_are_wrapped() -> None:
    """In files that the simulator has a version of, and in that of the CPU's vectors."""
    simulated = (ROOT / "tests/simt/include/common").iterdir()
    wrappers = {CSRC / "cuda" / "common" / path.name for path in simulated}
    for path in FILES:
        if path not in wrappers | {CSRC / "cpu" / "simd.hpp"}:
            assert not re.search(r"\basm\b", code_of(path)), path.relative_to(ROOT)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_has_its_stem_everywhere(operator: str) -> None:
    assert (CSRC / "ops" / f"{operator}.cpp").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{operator}.py").is_file()
    if operator in CPU_KERNELS:
        assert (CSRC / "cpu" / f"{operator}.hpp").is_file()
    if operator != "block_cache":
        assert operator in ops.__all__
        assert operator in reference.__all__
        registry = (ROOT / "benchmarks" / "registry.py").read_text()
        assert f'"{operator}"' in registry


def test_no_operator_is_forgotten() -> None:
    """Schemas are declared in files of these names, and nowhere else."""
    declared = {
        path.stem
        for path in (CSRC / "ops").glob("*.cpp")
        if "m.def(" in path.read_text() and path.stem != "build_info"
    }
    assert declared == set(OPERATORS)
    assert set(ops.__all__) <= set(OPERATORS)


def test_cuda_kernels_have_their_stem_everywhere() -> None:
    cmake = (ROOT / "cmake" / "Cuda.cmake").read_text()
    listed = re.search(r"set\(ATTNRES_CUDA_KERNELS ([^)]+)\)", cmake)
    assert listed is not None
    for stem in listed[1].split():
        assert stem in OPERATORS
        assert list((CSRC / "cuda" / stem).glob("*.cuh"))
        assert (ROOT / "tests" / "simt" / f"test_{stem}.py").is_file()
        for architecture in ("sm80", "sm90"):
            source = (CSRC / "cuda" / architecture / f"{stem}.cu").read_text()
            launchers = re.findall(rf"\blaunch<{architecture[2:]}>\(", source)
            assert len(launchers) == len(re.findall(rf"\blaunch_{stem}_\w+<", source)) > 0
    for architecture in ("sm80", "sm90"):
        found = {path.stem for path in (CSRC / "cuda" / architecture).glob("*.cu")}
        assert found == set(listed[1].split())


def imported(path: Path) -> set[str]:
    """Modules that a Python file imports, dotted, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_python_layers() -> None:
    """The library does not depend on what is built on top of it."""
    package = ROOT / "python" / "attnres_ext"
    above = ("cli", "training", "benchmarks", "models", "compat", "integrations")
    for path in package.glob("*.py"):
        if path.name != "__main__.py":
            for module in imported(path):
                assert not module.startswith(tuple(f"attnres_ext.{name}" for name in above)), (
                    f"{path.name} imports {module}"
                )
    for path in (package / "models").rglob("*.py"):
        for name in ("cli", "training", "benchmarks"):
            assert not any(m.startswith(f"attnres_ext.{name}") for m in imported(path)), path.name
    for path in package.rglob("*.py"):
        if "integrations" not in path.parts:
            assert not {"transformers", "peft", "accelerate"} & imported(path), path.name
    # The definition depends on nothing but torch.
    assert not any(m.startswith("attnres_ext") for m in imported(package / "reference.py"))
