"""Builds from nothing, in a folder of its own, and keeps how long it took and what came out.

    python tools/time_build.py                       into benchmarks/results
    python tools/time_build.py --out DIR --jobs 2

Compiler caches are switched off. The record is one JSON file, ``build-<date>.json``, which
``attnres bench report`` and ``tools/figures.py`` show: date, command, commit, hashes of ``csrc/``,
machine and versions as in other results, and

``seconds``, ``jobs``
    from the first compiler call to the last link, and how many ran at once;
``processor_seconds``
    that compilers and linkers computed, all cores together: hardly depends on what else runs;
``cuda_archs``
    the sets of CUDA kernels that were built, for example ``["80", "90"]``;
``steps``
    every compilation and link: ``output``, ``target``, ``seconds`` and ``bytes`` of what it made;
``libraries``
    every library as it is installed: ``name``, ``bytes``, and ``device_code``, one entry for each
    architecture that it carries kernels for, with the bytes that they take up, compressed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import resource
import shlex
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from attnres_ext.benchmarks import machine
from attnres_ext.training.files import write_json

ROOT = Path(__file__).resolve().parents[1]
# Where nvcc's container of device code begins, and the kinds of what is in it.
_FAT_BINARY = struct.pack("<I", 0xBA55ED50)
_FAT_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes that follow it
_FAT_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, -, bytes of header, of content, -, -, -, -, arch
_FAT_KINDS = {1: ("compute", "PTX"), 2: ("sm", "machine code")}


def read_ninja_log(path: Path) -> list[dict[str, Any]]:
    """The steps of the newest build of everything that ninja's log mentions, longest first.

    Each has its ``output``, a short name (``target``: the source file under ``csrc/``, with the set
    it is compiled for), and ``begin`` and ``end`` in seconds.

    Raises:
        ValueError: not a log of ninja's.
    """
    lines = path.read_text().splitlines()
    if not lines or not lines[0].startswith("# ninja log v"):
        raise ValueError(f"{path}: not a log of ninja's")
    steps = {}
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != 5 or not (fields[0] + fields[1]).isdigit():
            raise ValueError(f"{path}, line {number}: not a line of ninja's log")
        begin, end, _, output, _ = fields
        if not output.endswith("verify_globs"):
            # What was built twice is there twice, and the last one counts.
            steps[output] = {
                "output": output, "target": _target(output),
                "begin": int(begin) / 1e3, "end": int(end) / 1e3,
            }  # fmt: skip
    return sorted(steps.values(), key=lambda step: step["begin"] - step["end"])


def _target(output: str) -> str:
    folder, found, source = output.partition(".dir/")
    if not found:
        return output
    source = source.removesuffix(".o").removeprefix("csrc/")
    _, found, kernels = folder.rpartition("/")[2].partition("_ops_cpu_")
    return f"{source} ({kernels})" if found else source


def device_code(library: Path) -> list[dict[str, Any]]:
    """The CUDA code in a library, by architecture; empty where there is none.

    Raises:
        ValueError: its containers are not laid out as nvcc lays them out.
    """
    content = library.read_bytes()
    sizes: dict[tuple[int, int], int] = {}
    start = content.find(_FAT_BINARY)
    while start >= 0:
        try:
            _, _, header, length = _FAT_HEADER.unpack_from(content, start)
            at, end = start + header, start + header + length
            while at < end:
                kind, _, entry, payload, *_, arch = _FAT_ENTRY.unpack_from(content, at)
                if kind not in _FAT_KINDS or entry == 0:
                    raise ValueError(f"an entry of kind {kind}")
                sizes[arch, kind] = sizes.get((arch, kind), 0) + entry + payload
                at += entry + payload
        except (struct.error, ValueError) as error:
            raise ValueError(f"{library}: device code that cannot be read: {error}") from None
        start = content.find(_FAT_BINARY, end)
    return [
        {"arch": f"{_FAT_KINDS[kind][0]}_{arch}", "kind": _FAT_KINDS[kind][1], "bytes": size}
        for (arch, kind), size in sorted(sizes.items())
    ]


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

    def run(*command: object) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*map(str, command)], env=environment, check=True, stdout=sys.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    options = [f"-D{choice}" for choice in (f"Python_EXECUTABLE={sys.executable}", *choices())]
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
    spent = run("cmake", "--build", folder, "-j", jobs)
    run("cmake", "--install", folder, "--prefix", folder / "installed", "--strip")
    return spent


def choices() -> list[str]:
    """What the environment says about the build, as ``NAME=value``."""
    names = ("ATTNRES_CUDA", "ATTNRES_CUDA_ARCHS")
    return [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]


def describe(
    folder: Path, jobs: int, processor_seconds: float, code: dict[str, Any]
) -> dict[str, Any]:
    """The record of what :func:`build` made in ``folder`` of the sources ``code``."""
    steps = read_ninja_log(folder / ".ninja_log")
    cached = (folder / "CMakeCache.txt").read_text()
    archs = re.search(r"^ATTNRES_CUDA_ARCHS:\w+=(.*)$", cached, re.MULTILINE)
    with_cuda = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(?!.*NOTFOUND)(.+)$", cached, re.MULTILINE)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*choices(), "python", "tools/time_build.py", "--jobs", str(jobs)]),
        "seconds": max(step["end"] for step in steps) - min(step["begin"] for step in steps),
        "processor_seconds": processor_seconds,
        "jobs": jobs,
        "cuda_archs": archs[1].split(";") if archs and with_cuda else [],
        **code,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "steps": [
            {
                "output": step["output"],
                "target": step["target"],
                "seconds": step["end"] - step["begin"],
                "bytes": (folder / step["output"]).stat().st_size,
            }
            for step in steps
        ],
        "libraries": [
            {
                # The Python module's name without the tag of the Python that it is for.
                "name": f"{library.name.split('.')[0]}.so",
                "bytes": library.stat().st_size,
                "device_code": device_code(library),
            }
            for library in sorted((folder / "installed").glob("*.so"))
        ],
    }


def main() -> int:
    """Builds and keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attnres-build-") as name:
        # Asked before the build, because somebody may edit it meanwhile.
        code = machine.code()
        try:
            spent = build(Path(name), arguments.jobs)
        except subprocess.CalledProcessError as error:
            print(f"time_build: {error.cmd[1]} failed with {error.returncode}", file=sys.stderr)
            return 2
        record = describe(Path(name), arguments.jobs, spent, code)
    stamp = record["date"].replace("+00:00", "Z").replace(":", "")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"build-{stamp}.json"
    write_json(path, record)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
