"""The wheel: what is in it, and that it works in an environment that knows nothing of this folder.

It is built as `make wheel` builds it, in the build tree that is there: no C++ is compiled.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

from attnres_ext.version import __version__

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"cp{sys.version_info.major}{sys.version_info.minor}"
CACHE = BUILD / "CMakeCache.txt"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CACHE.exists(), reason="there is no build tree; `make test` makes one"),
]


def run(*command: object, cwd: Path, **env: str) -> str:
    """Output of a command that finds nothing of this folder by itself."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def cached(name: str) -> str:
    """What the build tree was configured with."""
    found = re.search(rf"^{name}:\w+=(.*)$", CACHE.read_text(), re.MULTILINE)
    assert found is not None, f"{CACHE} has no {name}"
    return found[1]


def build(folder: Path) -> None:
    command = "-m pip --disable-pip-version-check wheel --no-build-isolation --no-deps --wheel-dir"
    tools = str(Path(sys.executable).parent)
    run(
        sys.executable, *command.split(), folder, ".",
        cwd=ROOT,
        PATH=tools + os.pathsep + os.environ["PATH"],
        ATTNRES_CUDA=cached("ATTNRES_CUDA"),
        ATTNRES_CUDA_ARCHS=cached("ATTNRES_CUDA_ARCHS"),
        ATTNRES_CPU_SETS=cached("ATTNRES_CPU_SETS"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers of this run: two builds in one tree would be in each other's way."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "dist"
    with (shared / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            build(folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    install = "install --no-deps --no-index --no-compile --quiet"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter)
    run(*pip, *install.split(), wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file brings the modules of a folder, but not what its own .pth files add,
    # such as an editable install of this package.
    others = {sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])}
    (packages / "libraries.pth").write_text("".join(f"{path}\n" for path in sorted(others)))
    return interpreter


def test_the_wheel_is_named_after_version_and_platform(wheel: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"attnres_ext-{__version__}-{tag}-{tag}-linux_")


def test_the_wheel_holds_the_package_and_nothing_else(names: set[str]) -> None:
    info = f"attnres_ext-{__version__}.dist-info/"
    strange = [name for name in names if not name.startswith(("attnres_ext/", info))]
    assert strange == []
    unwanted = ("__pycache__", "/tests/", "benchmarks/results/", ".cpp", ".hpp", ".cu", ".jsonl")
    assert [name for name in names if any(part in name for part in unwanted)] == []
    assert f"{info}licenses/LICENSE" in names


def test_the_wheel_holds_every_module_and_data_file(names: set[str]) -> None:
    wanted = {"attnres_ext/_ops.so"}
    for folder, prefix in (("python/attnres_ext", ""), ("benchmarks", "benchmarks/")):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            if path.suffix in {".py", ".pyi", ".json", ".jinja"} and relative.parts[0] != "results":
                wanted.add(f"attnres_ext/{prefix}{relative.as_posix()}")
    assert wanted - names == set()
    # What setuptools left behind from files that are gone would be here, too.
    modules = {name for name in names if name.endswith(".py")}
    assert modules - wanted == set()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert f"attnres_ext/_C{suffix}" in names


def test_the_metadata_agrees(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"attnres_ext-{__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Name"] == "attnres-ext"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert "torch>=2.10" in metadata.get_all("Requires-Dist")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__


def test_it_works_where_it_is_installed(python: Path, tmp_path: Path) -> None:
    code = """
import torch, attnres_ext
from attnres_ext import _C, _native
from attnres_ext.models.kimi_linear import presets
from attnres_ext.benchmarks import registry

sources = [torch.randn(3, 16, requires_grad=True) for _ in range(3)]
out = attnres_ext.depth_attention(sources, torch.zeros(16))
torch.testing.assert_close(out, sum(sources) / 3)
out.sum().backward()
assert registry.CASES and presets("tiny").hidden_size
print(attnres_ext.__version__, _C.version, _native.LIBRARY)
"""
    ours, bindings, library = run(python, "-c", code, cwd=tmp_path).split()
    assert ours == bindings == __version__
    assert Path(library).is_relative_to(python.parents[1])


def test_its_command_works(python: Path, tmp_path: Path) -> None:
    printed = run(python.with_name("attnres"), "info", cwd=tmp_path)
    assert __version__ in printed
    assert str(python.parents[1]) in printed
    assert "attnres train" in run(python, "-m", "attnres_ext", "--help", cwd=tmp_path)
