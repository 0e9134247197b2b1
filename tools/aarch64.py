"""Builds the wheel for 64-bit Arm on this machine and tests it there by emulation.

    python tools/aarch64.py --work DIR [--cpu max] [--cuda] [PYTEST_ARGUMENTS]

Needs Debian 12's packages g++-aarch64-linux-gnu, qemu-user and rsync, `apt-get update` after
`dpkg --add-architecture arm64`, and the CMake of requirements/run.txt. Python is unpacked from
arm64 packages, torch and what tests need from wheels; nothing is installed. Some 20 minutes for
tests/ops. With --cuda also the CUDA kernels, with the nvcc that is here, for the servers that
NVIDIA calls sbsa: as long again as their build here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PACKAGES = [
    f"{name}:arm64"
    for name in ("python3.11", "python3.11-dev", "libpython3.11", "libstdc++6", "libgomp1")
]
# The oldest torch that is promised; its wheel is for the CPU.
WHEELS = [
    "torch==2.10.0", "numpy==2.4.6", "safetensors==0.8.0", "rich==15.0.0", "pytest==9.2.0",
    "hypothesis==6.170.15", "expecttest==0.3.0", "setuptools==84.2.1", "wheel==0.48.0",
    "pybind11==3.1.0", "typing_extensions", "filelock", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "fsspec", "iniconfig", "packaging", "pluggy", "pygments", "sortedcontainers",
    "markdown_it_py", "mdurl",
]  # fmt: skip
COMPILER = "aarch64-linux-gnu-g++"
PYTHON = """#!/bin/sh
PYTHONPATH={site}:$PYTHONPATH exec qemu-aarch64 -cpu {cpu} -L {root} {root}/usr/bin/python3.11 "$@"
"""


def main() -> int:
    """Says with pytest's exit status whether all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for all of it, some 2 GB")
    parser.add_argument("--cpu", default="max", help="processor: max has bfloat16, neoverse-n1 not")
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels")
    options, pytest_arguments = parser.parse_known_args()
    missing = [p for p in (COMPILER, "qemu-aarch64", "dpkg", "rsync") if shutil.which(p) is None]
    if missing:
        parser.error(f"not on the PATH: {', '.join(missing)}")
    work = options.work.resolve()
    unpack_packages(work)
    install_wheels(work)
    wheel = build_wheel(work, options.cuda)
    print(f"built {wheel}", flush=True)
    package = work / "package"
    shutil.rmtree(package, ignore_errors=True)
    zipfile.ZipFile(wheel).extractall(package)
    arguments = pytest_arguments or ["-q", str(HERE / "tests" / "ops")]
    return run_python(
        work, ["-m", "pytest", "-p", "no:cacheprovider", *arguments], package, cpu=options.cpu
    ).returncode


def unpack_packages(work: Path) -> None:
    """Python and all it depends on, into `root`."""
    packages, root = work / "packages", work / "root"
    if root.exists():
        return
    packages.mkdir(parents=True, exist_ok=True)
    others = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    depends = subprocess.run(
        ["apt-cache", "depends", "--recurse", *(f"--no-{kind}" for kind in others), *PACKAGES],
        check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    names = sorted({line for line in depends if line.endswith(":arm64") and line[0].isalpha()})
    subprocess.run(["apt-get", "download", "-qq", *names], cwd=packages, check=True)
    unfinished = work / "root.part"
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, unfinished], check=True)
    unfinished.rename(root)


def install_wheels(work: Path) -> None:
    """What Python imports, into `site`."""
    site = work / "site"
    if site.exists():
        return
    platforms = [
        f"--platform=manylinux{version}_aarch64" for version in ("2014", "_2_17", "_2_27", "_2_28")
    ]
    unfinished = work / "site.part"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", unfinished, "--no-deps",
         "--only-binary=:all:", "--python-version=3.11", *platforms, *WHEELS],
        check=True,
    )  # fmt: skip
    unfinished.rename(site)


def run_python(
    work: Path,
    arguments: list[str],
    path: Path | None = None,
    cpu: str = "max",
    folder: Path = HERE,
    **environment: str,
) -> subprocess.CompletedProcess[bytes]:
    """The emulated Python."""
    interpreter = work / f"python-{cpu}"
    interpreter.write_text(PYTHON.format(site=work / "site", root=work / "root", cpu=cpu))
    interpreter.chmod(0o755)
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    return subprocess.run(
        [interpreter, *arguments], cwd=folder, env={**os.environ, **threads, **environment}
    )


def cuda_toolkit(work: Path) -> Path:
    """The toolkit that is here, with the other processor's libraries in the place of its own."""
    toolkit, unfinished = work / "toolkit", work / "toolkit.part"
    if toolkit.exists():
        return toolkit
    told = subprocess.run(
        ["nvcc", "-c", "-x", "cu", "/dev/null", "--dryrun"], capture_output=True, text=True
    ).stderr
    here = Path(re.search(r"TOP=(\S+)", told)[1]).resolve()
    version = re.search(r"release ([\d.]+)", subprocess.run(
        ["nvcc", "--version"], check=True, capture_output=True, text=True
    ).stdout)[1]  # fmt: skip
    # A copy: nvcc looks for everything else beside itself.
    shutil.copytree(here / "bin", unfinished / "bin")
    (unfinished / "nvvm").symlink_to(here / "nvvm")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", unfinished / "wheel",
         "--no-deps", "--only-binary=:all:", "--platform=manylinux2014_aarch64",
         f"nvidia-cuda-runtime=={version}.*"],
        check=True,
    )  # fmt: skip
    target = unfinished / "targets" / "sbsa-linux"
    target.mkdir(parents=True)
    (target / "include").symlink_to(here / "include")
    (libraries,) = unfinished.glob("wheel/nvidia/*/lib")
    shutil.copytree(libraries, target / "lib")
    for library in (target / "lib").glob("*.so.*"):  # without the name that CMake looks for
        library.with_name(library.name.split(".so")[0] + ".so").symlink_to(library.name)
    # nvcc's other name for it.
    (target.parent / "aarch64-linux").symlink_to("sbsa-linux")
    unfinished.rename(toolkit)
    return toolkit


def build_wheel(work: Path, cuda: bool) -> Path:
    """Compiled here, for there: CMake asks the emulated Python where torch and its headers are."""
    tree, dist = work / "tree", work / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    # In a copy, whose build folder is its own, and is kept.
    subprocess.run(
        ["rsync", "-a", "--delete", "--exclude=/build", "--exclude=/.*", "--exclude=*.so",
         f"{HERE}/", tree],
        check=True,
    )  # fmt: skip
    cross = [
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}", f"-DPython_EXECUTABLE={work / 'python-max'}",
        f"-DPython_INCLUDE_DIR={work / 'root/usr/include/python3.11'}",
    ]  # fmt: skip
    if cuda:
        toolkit = cuda_toolkit(work)
        cross += [
            f"-DCMAKE_CUDA_COMPILER={toolkit / 'bin/nvcc'}", f"-DCUDAToolkit_ROOT={toolkit}",
            f"-DCMAKE_CUDA_HOST_COMPILER={COMPILER}",
        ]  # fmt: skip
    done = run_python(
        work, ["setup.py", "-q", "bdist_wheel", "--dist-dir", str(dist)], folder=tree,
        ATTNRES_CUDA="ON" if cuda else "OFF", CMAKE_ARGS=" ".join(cross),
        CPLUS_INCLUDE_PATH=str(work / "root/usr/include"),
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit("the wheel could not be built")
    return next(dist.glob("*_aarch64.whl"))


if __name__ == "__main__":
    sys.exit(main())
