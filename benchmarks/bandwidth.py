"""The yardstick: what ``dst.copy_(src)`` reaches here and now.

A kernel that does nothing but move its bytes takes as long as a copy of as many bytes. So each case
gets a copy of its own: source and destination are half of the case's bytes each, and the copy takes
turns with the contestants. (One figure for the machine would not do: a copy that fits into a cache
is several times faster than one that does not.)
"""

from __future__ import annotations

import torch

from attnres_ext.benchmarks.timing import Action, Effort, Timing, measure

#: Sizes of the buffers in `ladder`, in MiB.
LADDER = (1, 8, 32, 128, 256)


def copy_action(num_bytes: int, sets: int = 1) -> Action:
    """A copy that reads and writes ``num_bytes`` in all, over ``sets`` pairs of buffers."""
    count = max(1, num_bytes // 2 // torch.float32.itemsize)
    pairs = [(torch.full((count,), 1.0), torch.zeros(count)) for _ in range(sets)]

    def run(call: int) -> None:
        source, destination = pairs[call % sets]
        destination.copy_(source)

    return Action(run)


def ladder(effort: Effort) -> dict[int, tuple[float, Timing]]:
    """A copy that reads and writes ``num_bytes`` in all, over ``sets`` pairs of buffers."""
    result = {}
    for size in LADDER:
        num_bytes = 2 * size * 2**20
        timing = measure({"copy": copy_action(num_bytes)}, effort)["copy"]
        result[size] = (num_bytes / timing.median / 1e9, timing)
    return result
