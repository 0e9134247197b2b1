"""Builds csrc/ with CMake; everything that is not compilation lives in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """The program of that name from PyPI, which may be newer than the system's, or the system's."""
    try:
        module = __import__(name)
        program = Path(module.CMAKE_BIN_DIR if name == "cmake" else module.BIN_DIR) / name
    except (ImportError, AttributeError):
        return name
    return str(program) if program.exists() else name


class FreshBuild(build_py):
    """Packs what is there now: setuptools keeps modules of earlier builds that are gone since."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "attnres_ext", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds the CMake project once, then installs each library beside the package."""

    def get_ext_filename(self, name: str) -> str:
        # _ops holds no CPython API, so its file name carries no CPython ABI tag.
        if name.endswith("._ops"):
            return str(Path(*name.split("."))) + ".so"
        return super().get_ext_filename(name)

    def run(self) -> None:
        # A build tree that outlives pip's temporary one keeps rebuilds incremental; one for each
        # Python, so that wheels for several do not rebuild each other's _C.
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        self.build_dir = ROOT / "build" / tag
        configure = [
            tool("cmake"), "-S", ROOT, "-B", self.build_dir, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DATTNRES_CUDA={os.environ.get('ATTNRES_CUDA', 'AUTO')}",
            f"-DATTNRES_CPU_SETS={os.environ.get('ATTNRES_CPU_SETS', 'all')}",
        ]  # fmt: skip
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        if archs := os.environ.get("ATTNRES_CUDA_ARCHS"):
            configure.append(f"-DATTNRES_CUDA_ARCHS={archs}")
        subprocess.check_call(configure)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call([tool("cmake"), "--build", self.build_dir, "-j", jobs])
        super().run()

    def build_extension(self, ext: Extension) -> None:
        component = ext.name.rsplit(".", 1)[1]
        destination = Path(self.get_ext_fullpath(ext.name)).parent
        subprocess.check_call(
            [
                tool("cmake"), "--install", self.build_dir, "--component", component,
                "--prefix", destination, "--strip",
            ]
        )  # fmt: skip


setup(
    # benchmarks/ lies at the top level and installs as attnres_ext.benchmarks.
    packages=[
        *find_packages("python"),
        *(f"attnres_ext.{name}" for name in find_packages(include=["benchmarks*"])),
    ],
    ext_modules=[Extension("attnres_ext._ops", []), Extension("attnres_ext._C", [])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuild},
)
