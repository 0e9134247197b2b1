"""Builds csrc/ with CMake; everything that is not compilation lives in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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
            "cmake", "-S", ROOT, "-B", self.build_dir, "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DATTNRES_CUDA={os.environ.get('ATTNRES_CUDA', 'AUTO')}",
        ]  # fmt: skip
        if archs := os.environ.get("ATTNRES_CUDA_ARCHS"):
            configure.append(f"-DATTNRES_CUDA_ARCHS={archs}")
        subprocess.check_call(configure)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call(["cmake", "--build", self.build_dir, "-j", jobs])
        super().run()

    def build_extension(self, ext: Extension) -> None:
        component = ext.name.rsplit(".", 1)[1]
        destination = Path(self.get_ext_fullpath(ext.name)).parent
        subprocess.check_call(
            [
                "cmake",
                "--install",
                self.build_dir,
                "--component",
                component,
                "--prefix",
                destination,
                "--strip",
            ]
        )


setup(
    ext_modules=[Extension("attnres_ext._ops", []), Extension("attnres_ext._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
