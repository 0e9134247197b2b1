"""Builds from nothing, in a folder of its own, and keeps how long it took and what came out.

    python tools/time_build.py                       into benchmarks/results
    python tools/time_build.py --out DIR --jobs 2

Compiler caches are switched off. The record is one JSON file, which `attnres bench report` draws;
`benchmarks/builds.py` says what is in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnres_ext.benchmarks import builds, machine
from attnres_ext.training.files import write_text

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path, jobs: int) -> float:
    """Configures and builds everything in ``folder``, and installs it in ``folder/installed``.

    Returns:
        Seconds of processor time that compilers and linkers took, all cores together.
    """
    environment = {
        **os.environ,
        # cmake and ninja come from the environment's own folder of programs.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "CCACHE_DISABLE": "1",
    }
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-D{choice}" for choice in choices()]
    subprocess.run(configure, env=environment, check=True, stdout=sys.stderr)
    run = ["cmake", "--build", folder, "-j", str(jobs)]
    before = _processor_seconds()
    subprocess.run(run, env=environment, check=True, stdout=sys.stderr)
    spent = _processor_seconds() - before
    install = ["cmake", "--install", folder, "--prefix", folder / "installed", "--strip"]
    subprocess.run(install, env=environment, check=True, stdout=sys.stderr)
    return spent


def choices() -> list[str]:
    """What the environment says about the build, as ``NAME=value``."""
    names = ("ATTNRES_CUDA", "ATTNRES_CUDA_ARCHS")
    return [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def describe(
    folder: Path, jobs: int, processor_seconds: float, code: dict[str, Any]
) -> dict[str, Any]:
    """The record of what :func:`build` made in ``folder`` of the sources ``code``."""
    steps = builds.read_ninja_log(folder / ".ninja_log")
    libraries = sorted((folder / "installed").glob("*.so"))
    cached = (folder / "CMakeCache.txt").read_text()
    archs = re.search(r"^ATTNRES_CUDA_ARCHS:\w+=(.*)$", cached, re.MULTILINE)
    with_cuda = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(?!.*NOTFOUND)(.+)$", cached, re.MULTILINE)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*choices(), "python", "tools/time_build.py", "--jobs", str(jobs)]),
        "seconds": max(step.end for step in steps) - min(step.begin for step in steps),
        "processor_seconds": processor_seconds,
        "jobs": jobs,
        "cuda_archs": archs[1].split(";") if archs and with_cuda else [],
        **code,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "steps": [
            {
                "output": step.output,
                "target": step.target,
                "seconds": step.seconds,
                "bytes": (folder / step.output).stat().st_size,
            }
            for step in steps
        ],
        "libraries": [
            {
                # The Python module's name without the tag of the Python that it is for.
                "name": f"{library.name.split('.')[0]}.so",
                "bytes": library.stat().st_size,
                "device_code": [asdict(code) for code in builds.device_code(library)],
            }
            for library in libraries
        ],
    }


def main() -> int:
    """Builds and keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attnres-build-") as name:
        folder = Path(name)
        # Asked before the build, because somebody may edit it meanwhile.
        code = machine.code()
        try:
            spent = build(folder, arguments.jobs)
        except subprocess.CalledProcessError as error:
            print(f"time_build: {error.cmd[1]} failed with {error.returncode}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("time_build: interrupted, so nothing is kept", file=sys.stderr)
            return 130
        record = describe(folder, arguments.jobs, spent, code)
    stamp = record["date"].replace("+00:00", "Z").replace(":", "")
    path = arguments.out / builds.PATTERN.replace("*", stamp)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
