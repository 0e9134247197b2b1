"""What a build costs: time by target, and bytes of the libraries by part.

``tools/time_build.py`` builds from nothing and keeps what it finds as one JSON file,
``build-<date>.json``: date, command, commit, hashes of ``csrc/``, machine and versions as in other
results, and

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
    architecture that it carries kernels for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

#: How the records of builds are called.
PATTERN = "build-*.json"

_NINJA_LOG = "# ninja log v"
# Where nvcc's container of device code begins, and the kinds of what is in it.
_FAT_BINARY = struct.pack("<I", 0xBA55ED50)
_FAT_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes that follow it
_FAT_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, -, bytes of header, of content, -, -, -, -, arch
_FAT_KINDS = {1: "PTX", 2: "machine code"}


@dataclass(frozen=True)
class Step:
    """One command of a build.

    Attributes:
        output: what it makes, relative to the build tree.
        begin: seconds from the start of the build.
        end: the same.
    """

    output: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin

    @property
    def target(self) -> str:
        """A short name: the source file under ``csrc/``, with the set it is compiled for."""
        folder, found, source = self.output.partition(".dir/")
        if not found:
            return self.output
        source = source.removesuffix(".o").removeprefix("csrc/")
        _, _, library = folder.rpartition("/")
        _, found, kernels = library.partition("_ops_cpu_")
        return f"{source} ({kernels})" if found else source


@dataclass(frozen=True)
class DeviceCode:
    """What a library carries for one architecture of GPUs.

    Attributes:
        arch: for example ``"sm_90"``; ``"compute_90"`` for PTX.
        kind: "machine code" or "PTX".
        bytes: that it takes up in the file, compressed as it is.
    """

    arch: str
    kind: str
    bytes: int


def read_ninja_log(path: Path) -> list[Step]:
    """The steps of the newest build of everything that ``path`` mentions, longest first.

    Raises:
        ValueError: not a log of ninja's.
    """
    lines = path.read_text().splitlines()
    if not lines or not lines[0].startswith(_NINJA_LOG):
        raise ValueError(f"{path}: not a log of ninja's")
    steps = {}
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != 5 or not (fields[0] + fields[1]).isdigit():
            raise ValueError(f"{path}, line {number}: not a line of ninja's log")
        begin, end, _, output, _ = fields
        # What was built twice is there twice, and the last one counts.
        steps[output] = Step(output, int(begin) / 1e3, int(end) / 1e3)
    made = [step for step in steps.values() if not step.output.endswith("verify_globs")]
    return sorted(made, key=lambda step: -step.seconds)


def device_code(library: Path) -> list[DeviceCode]:
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
        DeviceCode(f"{'compute' if kind == 1 else 'sm'}_{arch}", _FAT_KINDS[kind], size)
        for (arch, kind), size in sorted(sizes.items())
    ]
