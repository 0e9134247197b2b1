"""Tables of what follows from the traffic plan alone, without measuring anything.

Part of ``tools/figures.py``. The plan is asked as it is compiled, in ``_C``, which is loaded by
file: importing the package would import torch, and checking the documentation has to be quick.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
#: Tokens for which single pass or two phases are chosen: a training batch, enough for either.
TOKENS = 8192
#: NVIDIA's data sheet of the H100 SXM5: float32 operations and bytes per second.
H100_OPERATIONS, H100_BYTES = 67e12, 3.35e12
#: Residual streams of manifold-constrained hyper-connections in the paper's Table 1.
MHC_STREAMS = 4


@dataclass(frozen=True)
class Stack:
    """A model by its shape: sublayers, sublayers in a block, hidden size."""

    name: str
    sublayers: int
    per_block: int
    hidden: int

    @property
    def blocks(self) -> int:
        """N, the last one perhaps shorter."""
        return -(-self.sublayers // self.per_block)

    @property
    def label(self) -> str:
        """With the paper's letters."""
        return f"{self.name}: L{self.sublayers} N{self.blocks} S{self.per_block}"

    def sites(self) -> Iterator[tuple[int, int]]:
        """For each block, the sources finished before it (the embedding is one) and its sites."""
        for block in range(self.blocks):
            yield block + 1, min(self.per_block, self.sublayers - block * self.per_block)


#: Hidden size does not enter bytes in units of d; the paper's Table 1 names none.
PAPER = Stack("Table 1", 128, 16, 7168)
KIMI = Stack("Kimi Linear 48B", 54, 6, 2304)
K3 = Stack("Kimi K3", 186, 24, 7168)
STACKS = (PAPER, KIMI, K3)


@lru_cache(maxsize=1)
def compiled() -> ModuleType:
    """The module ``_C`` of this checkout, without the package around it.

    Raises:
        FileNotFoundError: it is not built.
    """
    if "attnres_ext._C" in sys.modules:
        return sys.modules["attnres_ext._C"]
    found = sorted((ROOT / "python" / "attnres_ext").glob("_C.*.so"))
    for path in found:
        spec = importlib.util.spec_from_file_location("attnres_ext._C", path)
        if spec is None or spec.loader is None:
            continue
        try:
            module = importlib.util.module_from_spec(spec)
        except ImportError:  # of another Python
            continue
        spec.loader.exec_module(module)
        return module
    raise FileNotFoundError("the traffic plan is not built for this Python: `make test` builds it")


def moved(operator: str, direction: str, stack: Stack, *, accumulate: bool = False) -> int:
    """Full-size tensors that one call moves at the last block of ``stack``."""
    return compiled().bytes_moved(
        operator,
        direction,
        num_sources=stack.blocks,
        num_queries=stack.per_block,
        num_tokens=1,
        hidden=1,
        itemsize=1,
        accumulate=accumulate,
    )


#: Multiply-adds per element of a row, from the formulas, for N sources and S queries: forward the
#: square and the dot product of the key and the mix; backward the dot product with the incoming
#: gradient, three terms of the source's gradient, and one of the query's.
MULTIPLY_ADDS: dict[str, tuple[Callable[[int, int], int], Callable[[int, int], int]]] = {
    "depth_attention": (lambda n, s: 3 * n, lambda n, s: 5 * n),
    "accumulate_depth_attention": (lambda n, s: 3 * (n + 1), lambda n, s: 5 * (n + 1)),
    "inter_block_attention": (lambda n, s: (2 * s + 1) * n, lambda n, s: (4 * s + 1) * n),
    "merge_partial": (lambda n, s: 4, lambda n, s: 7),
}


def traffic() -> tuple[list[str], list[list[str]], int]:
    """Bytes of every operator in either direction, in X and for a batch."""
    header = ["operator", "shape", "forward", "backward", "adding into gradients"]
    header += [f"forward of {TOKENS} tokens in bf16", f"at {H100_BYTES / 1e12} TB/s"]
    rows = []
    for operator in MULTIPLY_ADDS:
        for stack in (KIMI, K3):
            forward = moved(operator, "forward", stack)
            backward = moved(operator, "backward", stack)
            adding = moved(operator, "backward", stack, accumulate=True)
            queries = f" S{stack.per_block}" if operator == "inter_block_attention" else ""
            sources = "" if operator == "merge_partial" else f"N{stack.blocks}{queries} "
            num_bytes = forward * TOKENS * stack.hidden * 2
            rows.append(
                [
                    f"`{operator}`",
                    f"{sources}D{stack.hidden}",
                    f"{forward} X",
                    f"{backward} X",
                    "–" if adding == backward else f"{adding} X",
                    f"{num_bytes / 1e6:,.0f} MB",
                    f"{1e6 * num_bytes / H100_BYTES:,.0f} µs",
                ]
            )
    return header, rows, 5


def intensity() -> tuple[list[str], list[list[str]], int]:
    """Operations per byte in bf16, against what an H100 can do in the time of a byte."""
    rows = []
    for operator, counts in MULTIPLY_ADDS.items():
        # Nothing in a merge depends on N or S.
        for stack in (KIMI,) if operator == "merge_partial" else (KIMI, K3):
            cells = []
            for direction, count in zip(("forward", "backward"), counts, strict=True):
                operations = 2 * count(stack.blocks, stack.per_block)
                per_byte = operations / (2 * moved(operator, direction, stack))
                cells += [f"{per_byte:.1f}", _limit(per_byte / (H100_OPERATIONS / H100_BYTES))]
            queries = f" S{stack.per_block}" if operator == "inter_block_attention" else ""
            sources = "" if operator == "merge_partial" else f"N{stack.blocks}{queries}"
            rows.append([f"`{operator}`", sources or "–", *cells])
    header = ["operator", "shape", "forward, operations per byte", "limit"]
    return [*header, "backward, operations per byte", "limit"], rows, 0


def ridge() -> str:
    """Below that table: where memory stops being the limit."""
    return (
        f"An H100 (SXM5) does {H100_OPERATIONS / H100_BYTES:.0f} operations in the time of a byte: "
        f"{H100_OPERATIONS / 1e12:.0f} TFLOP/s in float32 over {H100_BYTES / 1e12} TB/s, by "
        "NVIDIA's data sheet. Tensor cores do more."
    )


def _limit(share: float) -> str:
    if share < 0.5:
        return f"memory, {1 / share:.0f} × below"
    return f"both, at {100 * share:.0f} %" if share < 1.5 else "arithmetic"


def table1() -> tuple[list[str], list[list[str]], int]:
    """Traffic per token and sublayer in units of d: the paper's formulas, and our plan."""
    rows = [
        ["standard residual", "paper", *("3" for _ in STACKS)],
        [f"mHC, {MHC_STREAMS} streams", "paper", *(str(8 * MHC_STREAMS + 2) for _ in STACKS)],
        ["full, two phases", "paper", *(f"{s.per_block + s.blocks}" for s in STACKS)],
        ["block, two phases", "paper", *(f"{s.blocks / s.per_block + 5:.2f}" for s in STACKS)],
    ]
    ways: list[tuple[str, Callable[[int, int], int]]] = [
        ("block, two phases", lambda n, s: _plan(n, s).bytes_two_phase),
        ("block, single pass", lambda n, s: _plan(n, s).bytes_single_pass),
        ("block, as the plan chooses", _chosen),
    ]
    for name, count in ways:
        ours = [sum(count(n, s) for n, s in stack.sites()) / stack.sublayers for stack in STACKS]
        # The mix goes to the sublayer, whose own traffic the paper leaves out.
        rows.append([name, "ours, as the paper counts", *(f"{x - 1:.2f}" for x in ours)])
        rows.append([name, "ours, all of it", *(f"{x:.2f}" for x in ours)])
    full = [_full(stack) for stack in STACKS]
    rows.append(["full, single pass", "ours, as the paper counts", *(f"{x - 1:.1f}" for x in full)])
    training = [
        sum(_chosen(n, s, training=True) for n, s in stack.sites()) / stack.sublayers
        for stack in STACKS
    ]
    label = "block, as the plan chooses, forward and backward"
    rows.append([label, "ours, all of it", *(f"{x:.2f}" for x in training)])
    return ["scheme", "counted by", *(stack.label for stack in STACKS)], rows, len(STACKS)


def _plan(num_sources: int, num_queries: int, tokens: int = 1, training: bool = False):
    """In units of X where ``tokens`` is 1."""
    hidden, itemsize = (1, 1) if tokens == 1 else (2304, 2)
    return compiled().plan(
        num_sources, num_queries, tokens, hidden, itemsize, device="cuda", training=training
    )


def _chosen(num_sources: int, num_queries: int, training: bool = False) -> int:
    """What the plan for a GPU chooses for a batch."""
    choice = _plan(num_sources, num_queries, TOKENS, training)
    units = _plan(num_sources, num_queries, training=training)
    return units.bytes_two_phase if choice.two_phase else units.bytes_single_pass


def _full(stack: Stack) -> float:
    """Every sublayer reads the embedding and all sublayers before it."""
    total = sum(
        compiled().bytes_moved("depth_attention", "forward", n, 1, 1, 1, 1)
        for n in range(1, stack.sublayers + 1)
    )
    return total / stack.sublayers
