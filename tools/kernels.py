"""Reads the machine code of the CUDA kernels in a built ``_ops.so`` and prints it as a table.

    python tools/kernels.py [path/to/_ops.so]

Needs ``cuobjdump`` and ``nvdisasm``: from a CUDA toolkit, or from the packages
``nvidia-cuda-cuobjdump`` and ``nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_LIBRARY = ROOT / "python" / "attnres_ext" / "_ops.so"

ARCH = re.compile(r"arch = (sm_\w+)|code for (sm_\w+)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+) .*CONSTANT\[0\]:(\d+)")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
FUSED_MULTIPLY_ADDS = ("FFMA", "DFMA", "HFMA2", "FFMA2")
#: A loop with fewer multiply-adds, of numbers or of small matrices, is bookkeeping.
INNER_LOOP_MULTIPLY_ADDS = 8


@dataclass
class Loop:
    """An innermost loop that does arithmetic: how often each of its instructions occurs."""

    first: int
    last: int
    opcodes: Counter[str]
    #: Loads of small matrices that are under way before the first product on tensor cores.
    matrix_loads_ahead: int = 0

    @property
    def instructions(self) -> int:
        """Instructions of a warp each time round."""
        return sum(n for opcode, n in self.opcodes.items() if opcode != "NOP")

    @property
    def matrix_loads(self) -> int:
        """Loads of four small matrices from shared memory."""
        return count(self.opcodes, "LDSM")

    @property
    def matrix_stores(self) -> int:
        """Stores of four small matrices to shared memory."""
        return count(self.opcodes, "STSM")

    @property
    def multiply_adds(self) -> int:
        """Fused multiply-adds."""
        return count(self.opcodes, *FUSED_MULTIPLY_ADDS)

    @property
    def tensor_products(self) -> int:
        """Products on tensor cores."""
        return count(self.opcodes, "HMMA")

    def loads(self, *, wide: bool) -> int:
        """Loads of 16 bytes (wide) or of fewer, from shared or global memory."""
        return sum(
            n
            for opcode, n in self.opcodes.items()
            if opcode.split(".")[0] in {"LDS", "LDG", "LD"} and (".128" in opcode) == wide
        )


#: What a warp that computes does with every row of a tile: score it, mix it, write the mix.
TILE_PASS = ("HMMA.1688.", "HMMA.16816.", "STG.")
#: The same of phase 1's tile: products with queries, squares, results, put into shared memory.
PHASE_ONE_PASS = ("HMMA.16816.", "HMMA.1688.", "STSM.")
#: What a warp that merges does with every row: load it, find the logit, write what it makes of it.
MERGE_PASS = ("LDG.E.NA.128", "MUFU.RSQ", "STG.E.128")


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    arch: str
    symbol: str = ""  # the name that linkers see
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    constant: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)
    loops: list[Loop] = field(default_factory=list)
    #: Instructions of the shortest way round a loop that does all of ``TILE_PASS``, of
    #: ``PHASE_ONE_PASS`` or of ``MERGE_PASS``, or None.
    row_instructions: int | None = None
    #: The fewest loads of matrices under way when the first product behind them starts.
    matrix_loads_ahead: int | None = None

    @property
    def instructions(self) -> int:
        """Length of the code without padding."""
        return sum(n for opcode, n in self.opcodes.items() if opcode != "NOP")

    @property
    def spills(self) -> int:
        """Reads and writes of local memory: spilled registers, or arrays kept there."""
        return count(self.opcodes, "LDL", "STL")

    @property
    def tensor_products(self) -> int:
        """Products on tensor cores."""
        return count(self.opcodes, "HMMA")

    @property
    def bulk_copies(self) -> int:
        """Copies by the copy engine."""
        return count(self.opcodes, "UBLKCP")

    @property
    def remote_stores(self) -> int:
        """Stores to the shared memory of another CTA of the cluster."""
        return count(self.opcodes, "STAS")

    @property
    def row_loads(self) -> int:
        """Loads of 16 bytes that are read once."""
        return self.opcodes["LDG.E.NA.128"]

    def async_copies(self, *, wide: bool) -> int:
        """Asynchronous copies by a thread, of 16 bytes (wide) or of fewer."""
        return sum(
            n
            for opcode, n in self.opcodes.items()
            if opcode.startswith("LDGSTS") and (".128" in opcode) == wide
        )

    def global_stores(self, *, wide: bool) -> int:
        """Stores to global memory of 16 bytes (wide) or of fewer."""
        return sum(
            n
            for opcode, n in self.opcodes.items()
            if opcode.startswith("STG") and (".128" in opcode) == wide
        )


def count(opcodes: Counter[str], *stems: str) -> int:
    """How many instructions have one of these names, whatever follows the name's first dot."""
    return sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in stems)


def find_tool(name: str) -> str | None:
    """The program of that name: on the PATH, or in the wheel that carries it."""
    if found := shutil.which(name):
        return found
    nvidia = importlib.util.find_spec("nvidia")
    for base in (nvidia.submodule_search_locations or []) if nvidia else []:
        for candidate in sorted(Path(base).glob(f"*/bin/{name}")):
            return str(candidate)
    return None


def run_cuobjdump(option: str, library: Path) -> str:
    """What cuobjdump prints; empty for a library without device code."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise FileNotFoundError(
            "cuobjdump and nvdisasm are needed to read kernels; found neither or one"
        )
    # cuobjdump looks for nvdisasm on the PATH.
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [cuobjdump, option, str(library)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    # Without any device code it says so and fails.
    if done.returncode != 0 and "does not contain device code" in done.stdout + done.stderr:
        return ""
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump {option} {library}: {done.stderr.strip()}")
    return done.stdout


def demangle(names: list[str]) -> dict[str, str]:
    """Names without namespaces and parameters; the mangled ones where there is no c++filt."""
    tool = find_tool("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    )
    readable = {}
    for name, line in zip(names, text.stdout.splitlines(), strict=True):
        line = re.sub(r"attnres::cuda::(sm\d+::)?", "", line.removeprefix("void "))
        line = re.sub(r"\((int|unsigned int|bool)\)", "", line)
        readable[name] = line.split("(")[0].strip()
    return readable


def find_loops(code: list[tuple[int, str, str]]) -> list[Loop]:
    """Innermost loops over values: spans between a backward branch and its target.

    Loops with exponentials work on the logits of a row. Branches behind the last exit retry waits
    that the compiler moved out of the way.
    """
    loops: list[Loop] = []
    end = max((address for address, opcode, _ in code if opcode == "EXIT"), default=0)
    for address, opcode, operands in code:
        target = TARGET.search(operands)
        if not opcode.startswith("BRA") or target is None or address > end:
            continue
        first = int(target[1], 16)
        if first >= address:
            continue
        body = [op for at, op, _ in code if first <= at <= address]
        stems = [op.split(".")[0] for op in body]
        products_begin = stems.index("HMMA") if "HMMA" in stems else 0
        loop = Loop(first, address, Counter(body), stems[:products_begin].count("LDSM"))
        exponentials = loop.opcodes["MUFU.EX2"] > 0
        products = loop.multiply_adds + loop.tensor_products
        if products >= INNER_LOOP_MULTIPLY_ADDS and not exponentials:
            loops.append(loop)
    return [
        loop
        for loop in loops
        if not any(
            other is not loop and loop.first <= other.first and other.last <= loop.last
            for other in loops
        )
    ]


def find_blocks(code: list[tuple[int, str, str]]) -> tuple[list[list[str]], list[list[int]]]:
    """Basic blocks, as names of instructions, and the blocks that may come next.

    Branches of lanes that have parted are left out: where they meet again is the next instruction.
    """
    jumps = {}
    for number, (_, opcode, operands) in enumerate(code):
        target = TARGET.search(operands)
        if opcode.startswith("BRA") and not opcode.startswith("BRA.DIV") and target is not None:
            jumps[number] = int(target[1], 16)
    places = {address: number for number, (address, _, _) in enumerate(code)}
    targets = {places[to] for to in jumps.values() if to in places}
    ends = {n for n, (_, opcode, _) in enumerate(code) if n in jumps or opcode == "EXIT"}
    starts = sorted({0, *targets, *(n + 1 for n in ends if n + 1 < len(code))})
    block_of = {start: block for block, start in enumerate(starts)}
    blocks, followers = [], []
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        blocks.append([opcode for _, opcode, _ in code[start:end] if opcode != "NOP"])
        # A predicate is no part of what is read here: every branch may be taken or not.
        follow = [block_of[end]] if end < len(code) else []
        if end - 1 in jumps and jumps[end - 1] in places:
            follow.append(block_of[places[jumps[end - 1]]])
        followers.append(follow)
    return blocks, followers


def shortest_pass(
    blocks: list[list[str]], followers: list[list[int]], wanted: tuple[str, ...]
) -> int | None:
    """Instructions of the shortest way from a block back to it that meets all that is wanted."""
    met = [
        sum(1 << i for i, stem in enumerate(wanted) if any(op.startswith(stem) for op in block))
        for block in blocks
    ]
    everything = (1 << len(wanted)) - 1
    shortest = None
    for first in (block for block, found in enumerate(met) if found & 1):
        queue = [(0, first, 0)]
        seen = set()
        while queue:
            length, block, found = heapq.heappop(queue)
            if block == first and found == everything:
                shortest = length if shortest is None else min(shortest, length)
                break
            if (block, found) in seen:
                continue
            seen.add((block, found))
            for follower in followers[block]:
                state = (length + len(blocks[block]), follower, found | met[block])
                heapq.heappush(queue, state)
    return shortest


def fewest_loads_ahead(blocks: list[list[str]]) -> int | None:
    """Loads of matrices before the first product, in the block with products that has fewest."""
    ahead = []
    for block in blocks:
        products = [n for n, opcode in enumerate(block) if opcode.startswith("HMMA")]
        if products and any(opcode.startswith("LDSM") for opcode in block):
            ahead.append(sum(opcode.startswith("LDSM") for opcode in block[: products[0]]))
    return min(ahead, default=None)


def read_kernels(library: Path) -> list[Kernel]:
    """Every kernel of the library, for every architecture that it holds machine code of."""
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = name = ""
    for line in run_cuobjdump("--dump-resource-usage", library).splitlines():
        if found := ARCH.search(line):
            arch = found[1] or found[2]
        elif line.strip().startswith("Function "):
            name = line.strip().removeprefix("Function ").rstrip(":")
        elif (found := RESOURCES.search(line)) and name:
            registers, stack, shared, local, constant = map(int, found.groups())
            kernels[arch, name] = Kernel(
                name, arch, name, registers, stack, local, shared, constant
            )
            name = ""
    if not kernels:
        return []

    code: dict[tuple[str, str], list[tuple[int, str, str]]] = {key: [] for key in kernels}
    for line in run_cuobjdump("--dump-sass", library).splitlines():
        if found := INSTRUCTION.search(line):
            code[arch, name].append((int(found[1], 16), found[2], found[3].strip()))
        elif "Function :" in line:
            name = line.split(":", 1)[1].strip()
        elif found := ARCH.search(line):
            arch = found[1] or found[2]
    readable = demangle(sorted({name for _, name in kernels}))
    for key, kernel in kernels.items():
        kernel.opcodes = Counter(opcode for _, opcode, _ in code[key])
        kernel.loops = find_loops(code[key])
        if count(kernel.opcodes, "LDSM"):
            blocks, followers = find_blocks(code[key])
            wanted = PHASE_ONE_PASS if "inter_block" in kernel.name else TILE_PASS
            kernel.row_instructions = shortest_pass(blocks, followers, wanted)
            kernel.matrix_loads_ahead = fewest_loads_ahead(blocks)
        elif kernel.row_loads:
            kernel.row_instructions = shortest_pass(*find_blocks(code[key]), MERGE_PASS)
        kernel.name = readable[kernel.name]
    return sorted(kernels.values(), key=lambda k: (int(re.sub(r"\D", "", k.arch)), k.name))


def read_ptx(library: Path) -> dict[str, set[str]]:
    """The names of the kernels that the library holds PTX of, by the architecture it is for."""
    found: dict[str, set[str]] = {}
    arch = ""
    for line in run_cuobjdump("--dump-ptx", library).splitlines():
        if target := re.match(r"\.target (sm_\w+)", line):
            arch = target[1]
        elif entry := re.search(r"\.entry (\w+)\(", line):
            found.setdefault(arch, set()).add(entry[1])
    return found


def table(kernels: list[Kernel]) -> str:
    """The kernels as a Markdown table."""
    header = ["arch", "kernel", "regs", "stack", "spills", "smem", "params", "code"]
    header += ["copies", "inner loops: loads 16 B + narrower / multiply-adds"]
    rows = [header]
    for k in kernels:
        copies = f"bulk {k.bulk_copies}" if k.bulk_copies else ""
        if async_copies := k.async_copies(wide=True) + k.async_copies(wide=False):
            copies = f"cp.async {async_copies}"
        loops = ", ".join(
            f"{loop.loads(wide=True)} + {loop.loads(wide=False)} / {loop.multiply_adds}"
            + (f" and {loop.tensor_products} HMMA" if loop.tensor_products else "")
            for loop in k.loops
        )
        if k.row_instructions is not None:
            ahead = "" if k.matrix_loads_ahead is None else f", {k.matrix_loads_ahead} LDSM ahead"
            loops = f"{k.row_instructions} a row{ahead}; {loops}"
        numbers = [k.registers, k.stack, k.spills, k.shared, k.constant, k.instructions]
        rows.append([k.arch, k.name, *map(str, numbers), copies or "in place", loops])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, default=DEFAULT_LIBRARY)
    arguments = parser.parse_args()
    if not arguments.library.exists():
        print(f"{arguments.library} does not exist; build it first (make build)", file=sys.stderr)
        return 2
    kernels = read_kernels(arguments.library)
    if not kernels:
        print(f"{arguments.library} holds no CUDA kernels", file=sys.stderr)
        return 2
    print(table(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
