"""Times every configuration of a tile that fits, beside the one that is chosen.

    python tools/sweep.py [--seconds 110] [--shapes N9xD2304 ...]

For each shape the time that is left is shared out evenly. A configuration is asked for through
ATTNRES_CUDA_CONFIG, which the library reads at every call; one that does not fit is an error, and
is left out. Calls are replayed from a CUDA graph over inputs that do not stay in the second-level
cache, and compared with a copy of as many bytes. The constants that follow belong in
csrc/cuda/arch.hpp.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

VARIABLE = "ATTNRES_CUDA_CONFIG"
#: What is tried beside what is chosen, by operator: CTAs of a cluster, columns of a warp, CTAs of a
#: multiprocessor, stages; tokens of a stage. 0 leaves the choice to the library.
WISHES = {
    "depth_attention": {
        "cluster": (1, 2, 4, 8),
        "columns": (64, 128, 192, 256),
        "ctas": (0, 1, 2, 3),
        "stages": (0, 2, 3),
    },
    "inter_block_attention": {
        "inter_block_cluster": (1, 2, 4, 8, 16),
        "inter_block_columns": (128, 192, 224),
        "inter_block_tokens": (1, 2),
        "inter_block_ctas": (0, 1, 2),
        "inter_block_stages": (0, 2, 3),
    },
}
#: What the library says to a configuration that it cannot have.
DOES_NOT_FIT = "ATTNRES_CUDA_CONFIG"


@dataclass(frozen=True)
class Shape:
    """A read: depth attention, block summation with an output norm, or phase 1 of some queries."""

    sources: int
    tokens: int
    hidden: int
    sums: bool = False
    queries: int = 0

    @property
    def name(self) -> str:
        """As it is asked for: N9xD2304, and +sum, or N9xS6xD2304."""
        queries = f"xS{self.queries}" if self.queries else ""
        tokens = "" if self.tokens == 8192 else f"xM{self.tokens}"
        return f"N{self.sources}{queries}xD{self.hidden}{tokens}{'+sum' if self.sums else ''}"

    @property
    def operator(self) -> str:
        """The one whose tile serves it."""
        return "inter_block_attention" if self.queries else "depth_attention"

    @property
    def bytes_moved(self) -> int:
        """Bytes of bfloat16 that must be moved."""
        rows = self.sources + (4 if self.sums else self.queries or 1)
        return rows * self.tokens * self.hidden * 2


SHAPES = [
    Shape(10, 8192, 2304),
    Shape(9, 8192, 7168),
    Shape(54, 8192, 2304),
    Shape(8, 8192, 2304, sums=True),
    Shape(9, 8192, 2304, queries=6),
    Shape(8, 8192, 7168, queries=24),
    Shape(9, 8192, 4096),
    Shape(9, 8192, 1024),
    Shape(9, 8192, 512),
    Shape(2, 1, 7168),
    Shape(5, 128, 7168),
    Shape(9, 128, 7168),
]


@dataclass
class Timings:
    """Microseconds of a call, by configuration; '' is what the library chooses."""

    shape: Shape
    copy: float
    calls: dict[str, float] = field(default_factory=dict)
    left_out: int = 0

    def line(self) -> str:
        """The best beside the chosen one, and the general body."""
        best = min(self.calls, key=lambda config: self.calls[config])
        rows = self.calls.get(f"{self.shape.operator}=rows")
        parts = [
            f"{self.shape.name}: copy {self.copy:.1f} us",
            f"chosen {self.calls['']:.1f} us ({self.copy / self.calls['']:.2f} of copy)",
            f"best {self.calls[best]:.1f} us ({self.copy / self.calls[best]:.2f}) "
            f"with {best or 'what is chosen'}",
        ]
        if rows is not None:
            parts.append(f"general body {rows:.1f} us")
        if self.left_out:
            parts.append(f"{self.left_out} configurations not reached")
        return ", ".join(parts)


def configurations(operator: str) -> Iterator[str]:
    """What to ask for: the chosen and the general one first, then one thing after the other."""
    yield ""
    yield f"{operator}=rows"
    wishes = WISHES[operator]
    for values in itertools.product(*wishes.values()):
        yield ",".join(f"{key}={value}" for key, value in zip(wishes, values, strict=True) if value)


@contextlib.contextmanager
def configuration(config: str) -> Iterator[None]:
    """Asks the library for a configuration."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = config
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def sweep(
    shape: Shape,
    time_call: Callable[[str], float],
    copy: float,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Timings:
    """Times configurations of a shape until the time is over; the first two always.

    ``time_call`` gives the microseconds of a call under a configuration. A ``RuntimeError`` that
    speaks of the configuration leaves it out; any other one is a fault, and is passed on.
    """
    end = clock() + seconds
    timings = Timings(shape, copy)
    for number, config in enumerate(configurations(shape.operator)):
        if number >= 2 and clock() > end:
            timings.left_out += 1
            continue
        try:
            with configuration(config):
                timings.calls[config] = time_call(config)
        except RuntimeError as error:
            if DOES_NOT_FIT not in str(error):
                raise
    return timings


def replays(call: Callable[[int], object], sets: int, seconds: float = 0.05) -> float:
    """Microseconds of a call: the median replay of a CUDA graph of calls on all inputs."""
    import torch

    calls = max(sets, 8)
    call(0)  # a kernel's first launch does what a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number % sets)
    taken: list[float] = []
    end = time.monotonic() + seconds
    while len(taken) < 3 or time.monotonic() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(taken)


def time_shape(shape: Shape, seconds: float) -> Timings:
    """A sweep on the current device."""
    import torch

    from attnres_ext import accumulate_depth_attention, depth_attention, inter_block_attention

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    # Inputs of all sets are larger than the second-level cache, and twice.
    sets = max(2, min(64, -(-2 * cache // shape.bytes_moved)))
    row = (shape.tokens, shape.hidden)
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    queries = torch.randn(max(1, shape.queries), shape.hidden, device="cuda") / shape.hidden**0.5
    gain = torch.ones(shape.hidden, device="cuda")
    sources = [[torch.randn(row, **half) for _ in range(shape.sources)] for _ in range(sets)]
    sums = [(torch.randn(row, **half), torch.randn(row, **half)) for _ in range(sets)]

    def call(number: int) -> object:
        if shape.queries:
            return inter_block_attention(sources[number], queries)
        if not shape.sums:
            return depth_attention(sources[number], queries[0])
        partial, delta = sums[number]
        return accumulate_depth_attention(
            partial, delta, sources[number], queries[0], out_weight=gain
        )

    values = shape.bytes_moved // 4
    copies = [tuple(torch.empty(values, **half) for _ in range(2)) for _ in range(sets)]
    with torch.no_grad():
        copy = replays(lambda number: copies[number][0].copy_(copies[number][1]), sets)
        return sweep(shape, lambda _: replays(call, sets), copy, seconds)


def main() -> int:
    """Prints a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=110, help="for all shapes together")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="some of the shapes, by name")
    arguments = parser.parse_args()
    by_name = {shape.name: shape for shape in SHAPES}
    unknown = [name for name in arguments.shapes or [] if name not in by_name]
    if unknown:
        parser.error(f"no shape is named {unknown[0]}; there are {', '.join(by_name)}")
    shapes = [by_name[name] for name in arguments.shapes or by_name]

    import torch

    if not torch.cuda.is_available():
        print("a sweep needs a CUDA device, and there is none", file=sys.stderr)
        return 2
    print(torch.cuda.get_device_name())
    end = time.monotonic() + arguments.seconds
    for number, shape in enumerate(shapes):
        left = max(0.0, end - time.monotonic()) / (len(shapes) - number)
        print(time_shape(shape, left).line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
